"""Several commands after one another in each process of one launch, since DeepSpeed takes long to start:
`python tests/zero_worker.py FILE`, where FILE holds a JSON list of their arguments. `until STEP RUN COPY` copies a run
as if it had died after that step."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from mmdora.cli import main


def until(step: int, run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter")
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


def execute(arguments: list[str]) -> None:
    if arguments[0] == "until":
        if os.environ["RANK"] == "0":
            until(int(arguments[1]), Path(arguments[2]), Path(arguments[3]))
        torch.distributed.barrier()
        return
    try:
        main(arguments)
    except SystemExit as stop:
        if stop.code:
            raise
    gc.collect()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        execute(arguments)
