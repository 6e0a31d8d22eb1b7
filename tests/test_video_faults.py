"""Files that are not as they should be: each is read all the same, or told of in one UserError, never a traceback."""

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

ODD = (None, [], {}, "x", "", -1, 1.5, True, ["x"], {"x": 1})
OPEN = {name: entry[:2] for name, entry in test_video_benchmarks.OFFICIAL.items()}
CHOICES = {name: entry[:2] for name, entry in test_video_choices.OFFICIAL.items()}
ALL: dict[str, Any] = OPEN | CHOICES | {
    "nlvr": (lambda root, clip: test_nlvr.nlvr(root / "dev"), None),
    "nlvr2": (lambda root, clip: test_nlvr.nlvr2(root), None),
}  # fmt: skip
QUESTION = {"question_id": "1-1", "task_type": "t", "question": "q", "options": ["A. x"], "answer": "A"}
VIDEO = {"video_id": "1", "duration": "short", "domain": "d", "sub_category": "s"}
VARIANTS: dict[str, dict[str, Any]] = {  # further files of the same kinds
    "videomme": {"v.json": [VIDEO | {"questions": [QUESTION | {"response": "A"}]}]},
    "tvqa": {"s.json": {"solution": {"show": {"7": 1}}}},
}


def changed(value: Any) -> Iterator[Any]:
    """The value with each of its parts, in turn, replaced by each ODD one."""
    yield from ODD
    for key in range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else []:
        for part in changed(value[key]):
            other = copy.copy(value)
            other[key] = part
            yield other
        if isinstance(value, dict):
            yield {k: v for k, v in value.items() if k != key}


def forms(path: Path) -> Iterator[str]:
    """The file's text with its parts replaced."""
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
            yield from (lines([other, *rest]) for other in changed(first))
        return
    yield from map(json.dumps, changed(value))


@pytest.mark.parametrize("name", ALL)
def test_odd_files_are_read_or_refused(name, tmp_path):
    make, predictions = ALL[name]
    clip = write(tmp_path / "clip.mp4", "no video: none is opened")
    path = make(tmp_path / "data", clip)
    benchmark, asked = BENCHMARKS[name](), config(name, path if name == "nlvr" else tmp_path / "data")
    benchmark.questions(asked)
    files = [p for p in (tmp_path / "data").rglob("*") if p.suffix in (".json", ".jsonl", ".csv", ".txt")]
    files += [write(tmp_path / file, value) for file, value in VARIANTS.get(name, {}).items()]
    assert files or name == "videomme"
    refused = 0
    for path in files:
        whole = path.read_text()
        entry = asked if path.is_relative_to(tmp_path / "data") else config(name, path)
        for text in forms(path):
            path.write_text(text)
            refused += tried(lambda entry=entry: benchmark.questions(entry), tmp_path) is None
        path.write_text(whole)
    assert refused
    questions = benchmark.questions(asked)
    saved = write(tmp_path / "predictions.json", predictions if isinstance(predictions, dict | list) else [])
    csv = write(tmp_path / "predictions.csv", "q_uid,answer\nx,0\n")
    for path in (saved, csv):
        for text in forms(path):
            path.write_text(text)
            pairs = tried(lambda path=path: benchmark.read_predictions(path, questions), path) or []
            assert all(isinstance(part, str) for pair in pairs for part in pair)


def tried(read: Callable[[], Any], named: Path) -> Any:
    """What is read; None where it is refused in an error that names the file."""
    told = ""
    try:
        return read()
    except UserError as error:
        told = str(error)
    assert str(named) in told
    return None
