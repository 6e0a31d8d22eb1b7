"""Small benchmarks, and results of them made by `mmdora score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdora.cli import main
from tests.media import write_image


def command(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def write_questions(folder: Path, n: int = 12, per_image: int = 1, answers: Sequence[str] = ("yes",)) -> Path:
    """Write a `vqa` benchmark of `n` questions with `per_image` questions per image.

    A single answer is the reference; several are those of annotators.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        name = f"{i // per_image}.png"
        if i % per_image == 0:
            write_image(folder / name, seed=i, size=(32, 32))
        kind = "colour" if i % 2 else "shape"
        row = {"id": f"q{i}", "question": f"Question number {i}?", "image": name, "category": kind}
        rows.append(row | ({"answer": answers[0]} if len(answers) == 1 else {"answers": list(answers)}))
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def write_answers(path: Path, answers: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"id": f"q{i}", "response": answer} for i, answer in enumerate(answers)]))
    return path


def scored(out: Path, rows: Path, answers: Sequence[Any], *options: object) -> Path:
    """Score these answers to the questions of `write_questions`, and return the result directory."""
    predictions = write_answers(out.with_suffix(".answers.json"), answers)
    given = ("--predictions", predictions, "--annotations", rows, "--out", out)
    assert command("score", "vqa", *given, *options) == 0
    return out


def right(n: int, *wrong: int) -> list[str]:
    """Return `n` correct answers, except for the indices in `wrong`."""
    return ["no" if i in wrong else "yes" for i in range(n)]


def edit(path: Path, **changes: Any) -> None:
    """Change a report: entries of `receipt` are added, all else is replaced."""
    report = json.loads(path.read_text())
    report["receipt"] |= changes.pop("receipt", {})
    path.write_text(json.dumps(report | changes))


def judge(out: Path, score: float, only: bool = False) -> Path:
    """Give every answer of a result the same judged score; with `only` there are no official scores."""
    unscored = {"official": None, "strict": None} if only else {}
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().split("\n") if line]
    (out / "scores.jsonl").write_text("".join(json.dumps(line | unscored | {"judged": score}) + "\n" for line in lines))
    figure = {"value": 100 * score, "low": 0, "high": 100}
    report = json.loads((out / "report.json").read_text())
    shape = report["categories"]["shape"] | ({"value": None} if only else {}) | {"judged": figure}
    scores = report["scores"] | unscored | {"judged": figure}
    edit(out / "report.json", scores=scores, categories={"shape": shape}, receipt={"judge": "recorded"})
    return out
