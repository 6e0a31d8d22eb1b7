"""The whole walk of a benchmark: its files, the tiny model's answers, the report, predictions scored, the file handed
in. What a test makes of its own are the files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.benchmarks import BENCHMARKS, Question
from eval.results import read_result
from eval.run import evaluate, read_questions
from mmdora.commands.score import run as score
from mmdora.commands.submit import run as submit
from mmdora.config import EvaluationConfig


def config_for(benchmark: str, data: Path, **keys: Any) -> EvaluationConfig:
    return EvaluationConfig(name=benchmark, benchmark=benchmark, data=str(data), max_new_tokens=2, **keys)


def questions_of(benchmark: str, data: Path, **keys: Any) -> list[Question]:
    return BENCHMARKS[benchmark]().questions(config_for(benchmark, data, **keys))


def answered(model: Any, encoder: Any, benchmark: str, data: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    """The report on the model's answers; the result is in `folder`."""
    config = config_for(benchmark, data, **keys)
    return evaluate(model, encoder, config, read_questions(config), folder)


def scored(benchmark: str, predictions: Path, data: Path, out: Path, split: str | None = None) -> dict[str, Any]:
    """The report of `mmdora score`; the result is in `out`."""
    score(benchmark, predictions, str(data), split, as_json=True, out=out, overwrite=False, plugins=[])
    return read_result(out).report


def handed_in(folder: Path, out: Path) -> Path:
    """What `mmdora submit` wrote."""
    submit([folder], out, plugins=[])
    return out


def responses(folder: Path) -> dict[str, str]:
    return {row["id"]: row["response"] for row in read_result(folder).rows}


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
