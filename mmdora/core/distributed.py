"""What processes tell each other. Everything here is a collective: every process calls it, or all wait for ever. A
process that is alone gets its own back."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp


def objects_of_all(mine: Any) -> list[Any]:
    """What every process has, by rank; anything that can be pickled."""
    if not torch.distributed.is_initialized():
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def from_main(mine: Any) -> Any:
    """What rank 0 has."""
    return objects_of_all(mine)[0]


def figures_of_all(mine: list[float], device: torch.device) -> Tensor:
    """The same figures of every process, float64 [processes, figures], on the CPU."""
    figures = torch.tensor(mine, dtype=torch.float64, device=device)
    if not torch.distributed.is_initialized():
        return figures[None].cpu()
    everyone = [torch.empty_like(figures) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, figures)
    return torch.stack(everyone).cpu()


def which_in_any(flags: list[bool], device: torch.device) -> list[bool]:
    """Of each flag, whether any process has it set."""
    found = torch.tensor(flags, dtype=torch.float32, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def any_process(yes: bool) -> bool:
    """Whether any process says yes."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return which_in_any([yes], device)[0]


def on_device(model: Any) -> Any:
    """The model on this process's GPU, where there is one."""
    return model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}") if torch.cuda.is_available() else model


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
