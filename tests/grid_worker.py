"""Many runs in the same processes, one after another: `python -m tests.grid_worker PLAN`, also under torchrun.

PLAN is a JSON list of `Case`s. A case's outcome is in its output folder: `done` holds "ok" or the error, `gradients.pt`
what every step's gradients were, where `record` asks for it. A case that takes longer than LIMIT ends the processes.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LIMIT = 120  # seconds that one case may take, and that a process waits for another


@dataclass(frozen=True)
class Case:
    """One `mmdora train`. `arguments` are the command line's; `output` is where `training.output` points."""

    output: str
    arguments: list[str]
    record: bool = False


def recording(trainer_class: type, folder: Path) -> type:
    """A trainer that keeps every step's gradients: whole, averaged over processes, before they are clipped."""

    class Recording(trainer_class):  # type: ignore[misc,valid-type]
        def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
            prepared = super()._prepare_for_training(*args, **kwargs)
            self.steps: list[dict[str, Tensor]] = []
            if self.is_deepspeed_enabled:
                engine = self.model_wrapped
                step = engine.step
                engine.step = lambda *a, **k: (self.keep(), step(*a, **k))
            return prepared

        def _clip_grad_norm(self, model: Any) -> Any:
            if not self.is_deepspeed_enabled:  # else the engine has stepped
                self.keep()
            return super()._clip_grad_norm(model)

        def keep(self) -> None:
            from deepspeed.utils import safe_get_full_grad

            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            whole = {n: p.grad if p.grad is not None else safe_get_full_grad(p) for n, p in trained.items()}
            zero = {n: torch.zeros_like(p) for n, p in trained.items() if whole[n] is None}  # a step without pictures
            self.steps.append({n: g.detach().float().clone() for n, g in (whole | zero).items()})

        def train(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train(*args, **kwargs)
            if self.is_world_process_zero():
                torch.save(self.steps, folder / "gradients.pt")
            return result

    return Recording


def run(case: Case) -> str:
    from mmdora.cli import main as command

    train: Any = importlib.import_module("mmdora.apps.train")
    plain = train.AdapterTrainer
    if case.record:
        train.AdapterTrainer = recording(plain, Path(case.output))
    try:
        command(["train", *case.arguments])
    except SystemExit as stop:
        return "ok" if not stop.code else f"exit code {stop.code}"
    except Exception:
        return traceback.format_exc()
    finally:
        train.AdapterTrainer = plain
    return "ok"


def forget() -> None:
    """What a run leaves behind in its process, but for the process group."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    gc.collect()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def main() -> None:
    cases = [Case(**case) for case in json.loads(Path(sys.argv[1]).read_text())]
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if world > 1:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    for case in cases:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        outcome = run(case)
        forget()
        outcomes: list[Any] = [outcome]
        if world > 1:
            outcomes = [None] * world
            dist.all_gather_object(outcomes, outcome)
        faulthandler.cancel_dump_traceback_later()
        if rank == 0:
            bad = [f"rank {i}: {text}" for i, text in enumerate(outcomes) if text != "ok"]
            Path(case.output).mkdir(parents=True, exist_ok=True)
            Path(case.output, "done").write_text("\n".join(bad) or "ok")


if __name__ == "__main__":
    main()
