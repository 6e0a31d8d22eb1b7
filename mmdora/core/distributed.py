"""Rank, world size, and collectives.

`rank()`, `world_size()` and `local_rank()` read the environment variables of torchrun and deepspeed, so they work
before a process group exists. The other functions are collectives: every process must call them, and a single process
gets its own value back. torch is imported inside the functions, because the command line reads the rank before it needs
torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from mmdora.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """Return the launcher's rank; without a launcher, that of the process group if there is one."""
    if "RANK" not in os.environ and (group := _process_group()):
        return group.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the rank on this machine, which is also the index of this process's GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes on this machine, as torchrun (LOCAL_WORLD_SIZE) or deepspeed (LOCAL_SIZE) set it.

    Launchers that set neither, such as srun, start a process per task: SLURM_NTASKS_PER_NODE, if Slurm was given it.
    """
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            return min(int(os.environ[name]), world_size())
    return 1


def is_main() -> bool:
    """Return whether this is rank 0, the only process that prints and writes results."""
    return rank() == 0


def _process_group() -> Any:
    """Return torch.distributed if a process group exists, as in processes that `torch.multiprocessing` started."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None


def to_local_device(model: Any) -> Any:
    """Move a model to this process's GPU; without a GPU it stays where it is."""
    import torch

    return model.to(f"cuda:{local_rank()}") if torch.cuda.is_available() else model


def all_gather_objects(value: Any) -> list[Any]:
    """Return the picklable values of all processes, ordered by rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Return rank 0's value in every process."""
    return all_gather_objects(value)[0]


def run_on_main(action: Callable[[], T]) -> T:
    """Run `action` in rank 0 and return its result in every process. A UserError or OSError is raised in every one."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main():
        try:
            outcome = (action(), None)
        except (UserError, OSError) as raised:
            outcome = (None, raised)
    result, error = from_main(outcome)
    if error is not None:
        raise error
    return result


def all_gather_numbers(values: list[float], device: torch.device) -> Tensor:
    """Return the same list of numbers from every process, float64 [processes, numbers], on the CPU."""
    import torch

    local = torch.tensor(values, dtype=torch.float64, device=device)
    if not torch.distributed.is_initialized():
        return local[None].cpu()
    gathered = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, local)
    return torch.stack(gathered).cpu()


def any_rank_each(flags: list[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether it is set in any process."""
    import torch

    combined = torch.tensor(flags, dtype=torch.float32, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(combined, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in combined.tolist()]


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set in any process."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return any_rank_each([flag], device)[0]
