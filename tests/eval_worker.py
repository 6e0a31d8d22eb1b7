"""Run `mmdora eval` in each process of a launch, several times in a row, since every start imports torch:
`python -m tests.eval_worker PLAN`, where PLAN is a JSON file with the fields of `Plan`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval import generation
from mmdora.cli import main


@dataclass(frozen=True)
class Plan:
    arguments: list[str]
    log: str  # every process appends the ids of the questions that it generates answers for
    kill_rank: int | None = None  # this rank is killed by SIGKILL when its second batch begins
    reruns: list[list[str]] = field(default_factory=list)  # [file to copy, destination, free port]


def watch(plan: Plan) -> None:
    """Log the questions of every batch, and kill this process if the plan says so."""
    answer, batches = generation.Answerer.__call__, 0

    def watched(self: Any, batch: list[Any]) -> list[str]:
        nonlocal batches
        batches += 1
        if batches == 2 and int(os.environ["RANK"]) == plan.kill_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(plan.log).open("a") as file:
            file.writelines(f"{question.id}\n" for question, _ in batch)
        return answer(self, batch)

    generation.Answerer.__call__ = watched  # type: ignore[method-assign]


def exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    watch(plan)
    codes = [exit_code(plan.arguments)]
    for source, destination, port in plan.reruns:
        os.environ["MASTER_PORT"] = port  # the processes meet again in a new store
        if os.environ["RANK"] == "0":
            shutil.copy(source, destination)
        codes.append(exit_code(plan.arguments))
    Path(f"{sys.argv[1]}.rank{os.environ['RANK']}").write_text(json.dumps(codes))
    sys.exit(codes[-1])
