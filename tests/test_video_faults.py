"""Malformed benchmark files: each is read, or rejected with a UserError that names it; there is never a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import BENCHMARKS
from mmdora.core.errors import UserError
from tests import test_nlvr, test_video_benchmarks, test_video_choices
from tests.benchmark_walk import config, lines, write

UNEXPECTED = (None, [], {}, "x", "", -1, 1.5, True, ["x"], {"x": 1})
OPEN = {name: entry[:2] for name, entry in test_video_benchmarks.OFFICIAL.items()}
CHOICES = {name: entry[:2] for name, entry in test_video_choices.OFFICIAL.items()}
ALL: dict[str, Any] = OPEN | CHOICES | {
    "nlvr": (lambda root, clip: test_nlvr.nlvr(root / "dev"), None),
    "nlvr2": (lambda root, clip: test_nlvr.nlvr2(root), None),
}  # fmt: skip
QUESTION = {"question_id": "1-1", "task_type": "t", "question": "q", "options": ["A. x"], "answer": "A"}
VIDEO = {"video_id": "1", "duration": "short", "domain": "d", "sub_category": "s"}
VARIANTS: dict[str, dict[str, Any]] = {  # further valid files
    "videomme": {"v.json": [VIDEO | {"questions": [QUESTION | {"response": "A"}]}]},
    "tvqa": {"s.json": {"solution": {"show": {"7": 1}}}},
}


def mutations(value: Any) -> Iterator[Any]:
    """Yield the value with each of its parts, in turn, replaced by each UNEXPECTED value or removed."""
    yield from UNEXPECTED
    for key in range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else []:
        for part in mutations(value[key]):
            other = copy.copy(value)
            other[key] = part
            yield other
        if isinstance(value, dict):
            yield {k: v for k, v in value.items() if k != key}


def mutated_texts(path: Path) -> Iterator[str]:
    """Yield the file's text with its parts replaced."""
    text = path.read_text()
    yield from ("", "{", "nonsense", '"', "[1]")
    rows = text.split("\n")
    for i in range(min(3, len(rows))):
        for row in (rows[i] + ",x\tx", rows[i].replace(",", "\t"), "x" + rows[i][1:], rows[i][:9]):
            yield "\n".join([*rows[:i], row, *rows[i + 1 :]])
    try:
        value = json.loads(text)
    except ValueError:
        if text.startswith("{"):
            first, *rest = [json.loads(row) for row in text.split("\n") if row]
            yield from (lines([other, *rest]) for other in mutations(first))
        return
    yield from map(json.dumps, mutations(value))


@pytest.mark.parametrize("name", ALL)
def test_malformed_files_are_read_or_rejected(name, tmp_path):
    make, predictions = ALL[name]
    video = write(tmp_path / "clip.mp4", "not a video; it is never opened")
    path = make(tmp_path / "data", video)
    benchmark, entry = BENCHMARKS[name](), config(name, path if name == "nlvr" else tmp_path / "data")
    benchmark.questions(entry)
    files = [p for p in (tmp_path / "data").rglob("*") if p.suffix in (".json", ".jsonl", ".csv", ".txt")]
    files += [write(tmp_path / file, value) for file, value in VARIANTS.get(name, {}).items()]
    assert files or name == "videomme"
    rejected = 0
    for path in files:
        original = path.read_text()
        used = entry if path.is_relative_to(tmp_path / "data") else config(name, path)
        for text in mutated_texts(path):
            path.write_text(text)
            rejected += read_or_none(lambda used=used: benchmark.questions(used), tmp_path) is None
        path.write_text(original)
    assert rejected
    questions = benchmark.questions(entry)
    saved = write(tmp_path / "predictions.json", predictions if isinstance(predictions, dict | list) else [])
    csv = write(tmp_path / "predictions.csv", "q_uid,answer\nx,0\n")
    for path in (saved, csv):
        for text in mutated_texts(path):
            path.write_text(text)
            pairs = read_or_none(lambda path=path: benchmark.read_predictions(path, questions), path) or []
            assert all(isinstance(part, str) for pair in pairs for part in pair)


def read_or_none(read: Callable[[], Any], path: Path) -> Any:
    """Return what is read, or None if it raises a UserError that names the path."""
    message = ""
    try:
        return read()
    except UserError as error:
        message = str(error)
    assert str(path) in message
    return None
