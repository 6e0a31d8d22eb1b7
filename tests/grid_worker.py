"""A process that runs `mmdora train` cases one after another: `torchrun -m tests.grid_worker QUEUE PID`.

Starting processes and importing torch and DeepSpeed takes longer than a small run, so tests share these processes.
QUEUE is a folder into which tests/grid.py writes one file per case, `0.json`, `1.json`, ...; rank 0 answers with
`0.done`: "ok", or the errors by rank. The processes end with a case `null`, or when the process PID is gone. A case
that takes longer than LIMIT ends them with a traceback of every thread.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LIMIT = 300  # seconds that one case may take, and that a process waits for another


@dataclass(frozen=True)
class Case:
    """One `mmdora train`.

    Attributes:
        output: the value of `training.output`.
        arguments: the command line after `train`.
        record: whether to save the gradients of every step to `gradients.pt` in `output`.
        plugins: a folder with plugin modules, importable for this case only.
    """

    output: str
    arguments: list[str]
    record: bool = False
    plugins: str | None = None


def recording(trainer_class: type, folder: Path) -> type:
    """Return a trainer that keeps every step's full gradients, averaged over processes, before they are clipped."""

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
            if not self.is_deepspeed_enabled:  # DeepSpeed's engine has already stepped
                self.keep()
            return super()._clip_grad_norm(model)

        def keep(self) -> None:
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            full: dict[str, Tensor | None] = {n: p.grad for n, p in trained.items()}
            if self.is_deepspeed_enabled:
                from deepspeed.utils import safe_get_full_grad

                full = {n: g if g is not None else safe_get_full_grad(trained[n]) for n, g in full.items()}
            # A step without images gives the vision encoder no gradient.
            zeros = {n: torch.zeros_like(p) for n, p in trained.items() if full[n] is None}
            self.steps.append({n: g.detach().float().clone() for n, g in (full | zeros).items()})

        def train(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train(*args, **kwargs)
            if self.is_world_process_zero():
                torch.save(self.steps, folder / "gradients.pt")
            return result

    return Recording


def run(case: Case) -> str:
    """Run a case in this process; return "ok" or the error."""
    from mmdora.cli import main as command

    module: Any = importlib.import_module("mmdora.apps.train")
    trainer_class = module.AdapterTrainer
    if case.record:
        module.AdapterTrainer = recording(trainer_class, Path(case.output))
    try:
        with plugins_from(case.plugins):
            command(["train", *case.arguments])
    except SystemExit as stop:
        return "ok" if not stop.code else f"exit code {stop.code}"
    except Exception:
        return traceback.format_exc()
    finally:
        module.AdapterTrainer = trainer_class
    return "ok"


@contextmanager
def plugins_from(folder: str | None) -> Iterator[None]:
    """Make modules in `folder` importable inside the block; forget them, and a patched `Encoder.encode`, after it."""
    from data_pipelines.encoding import Encoder

    encode = Encoder.encode
    if folder is not None:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        Encoder.encode = encode  # type: ignore[method-assign]
        if folder is not None:
            sys.path.remove(folder)
            for path in Path(folder).glob("*.py"):
                sys.modules.pop(path.stem, None)


def reset_process() -> None:
    """Reset what a run leaves in its process, except the process group."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    gc.collect()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def next_case(file: Path, parent: int) -> Case | None:
    """Wait for the file of the next case; return None if there will be none."""
    while not file.exists():
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            return None
        time.sleep(0.1)
    content = json.loads(file.read_text())
    return None if content is None else Case(**content)


def main() -> None:
    import deepspeed.ops

    queue, parent = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    number = 0
    while (case := next_case(queue / f"{number}.json", parent)) is not None:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        outcome = run(case)
        reset_process()
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome)
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        sys.stderr.flush()
        if dist.get_rank() == 0:
            errors = [f"rank {i}: {text}" for i, text in enumerate(outcomes) if text != "ok"]
            done = queue / f"{number}.done"
            done.with_suffix(".new").write_text("\n".join(errors) or "ok")
            done.with_suffix(".new").rename(done)
        number += 1


if __name__ == "__main__":
    main()
