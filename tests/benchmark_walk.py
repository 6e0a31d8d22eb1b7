"""Helpers of all benchmark tests: read questions, evaluate the tiny model, score predictions, write a submission."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.encoding import Encoder
from eval.benchmarks import BENCHMARKS, Question
from eval.results import read_result
from eval.run import evaluate, read_questions
from mmdora.cli.score import score
from mmdora.cli.submit import submit
from mmdora.core.config import EvaluationConfig, ModelConfig, VideoConfig
from mmdora.models.loading import load_model


@pytest.fixture(scope="module")
def small():
    """(model, encoder) of the shipped base, loaded once per module; three frames per video."""
    torch.manual_seed(0)
    model, processor = load_model(ModelConfig(path="assets/tiny-llava", dtype="float32"))
    return model, Encoder(processor, VideoConfig(num_frames=3))


def config(benchmark: str, data: Path, **keys: Any) -> EvaluationConfig:
    return EvaluationConfig(name="b", benchmark=benchmark, data=str(data), max_new_tokens=2, **keys)


def questions_of(benchmark: str, data: Path, **keys: Any) -> list[Question]:
    """Return the questions that `mmdora score` reads: their media need not exist."""
    return BENCHMARKS[benchmark]().questions(config(benchmark, data, **keys))


def walk(small: Any, benchmark: str, data: Path, out: Path, **keys: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate the tiny model on all questions; return the report and the rows of scores.jsonl."""
    entry = config(benchmark, data, **keys)
    questions = read_questions(entry)
    report = evaluate(*small, entry, questions, out)
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().split("\n") if line]
    assert [row["id"] for row in rows] == [q.id for q in questions]
    assert all(isinstance(row["response"], str) for row in rows)
    return report, rows


def scored(
    benchmark: str, predictions: Path, annotations: Path, split: str | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Return the report that `mmdora score --json` prints; with `out`, the result is written there."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        score(benchmark, predictions, str(annotations), split, True, out, False)
    return json.loads(printed.getvalue())


def responses(folder: Path) -> dict[str, str]:
    """Return a result's answers by question id."""
    return {row["id"]: row["response"] for row in read_result(folder).rows}


def submitted(folders: list[Path], out: Path) -> bytes:
    """Return the file that `mmdora submit` writes."""
    submit(folders, out)
    return out.read_bytes()


def write(path: Path, value: Any) -> Path:
    """Write text as it is, any other value as JSON; create folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_lines(path: Path, rows: list[Any]) -> Path:
    return write(path, lines(rows))
