"""`mmdora eval` in real processes: killed and gone on with, and shared out by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from eval import generation
from tests.conftest import ROOT
from tests.grid import launch
from tests.media import write_image
from tests.test_runs import command
from tests.test_zero import torchrun

COUNT = 11
# A plugin that writes down what is asked, and under which rank 1 meets its end in its second batch.
WATCH = """
import os
from eval.generation import Answerer
plain, left = Answerer.__call__, 2 if os.environ["RANK"] == os.environ.get("DIES") else 0
def watched(self, batch):
    global left
    left -= 1
    if left == 0:
        raise LookupError("this rank has had enough")
    with open(os.environ["ASKED"], "a") as file:
        file.writelines(f"{question.id}\\n" for question, _ in batch)
    return plain(self, batch)
Answerer.__call__ = watched
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for i in range(COUNT):
        words = ("What color is the circle?", "Is there a red square?", "How many objects are there in it?")[i % 3]
        turns = [{"from": "human", "value": words if i == 4 else f"<image>\n{words}"}, {"from": "gpt", "value": "red"}]
        rows.append({"id": f"q{i}", "conversations": turns} | ({} if i == 4 else {"image": f"{i}.png"}))
        write_image(folder / f"{i}.png", seed=i, size=(64, 64))
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    asked = ["--benchmark", "vqa", "--data", str(data), "--batch-size", "2", "--out", str(out)]
    return ["eval", "assets/tiny-llava", *asked, *more]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """The result of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert command(*arguments(data, out)) == 0
    return out / "vqa"


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def same_result(ours: Path, theirs: Path) -> bool:
    reports = [json.loads((result / "report.json").read_text()) for result in (ours, theirs)]
    files = [(result / name).read_text() for result in (ours, theirs) for name in ("responses.jsonl", "scores.jsonl")]
    return files[:2] == files[2:] and reports[0] == reports[1]


def test_killed_in_the_midst_it_asks_only_what_is_not_answered(data, alone, tmp_path, monkeypatch):
    """SIGKILL while the third batch or a later one is answered, and a line that was half written."""
    environment = os.environ | {"END": "forward 8 KILL", "RANK": "0"}
    asked = arguments(data, tmp_path, "--plugin", "tests.killer")
    killed = subprocess.run([sys.executable, "-m", "mmdora.cli", *asked], cwd=ROOT, env=environment, check=False)
    assert killed.returncode == -9
    own = tmp_path / "vqa" / "responses.jsonl"
    answered = {row["id"] for row in rows_of(own)}
    assert 0 < len(answered) < COUNT
    with own.open("a") as file:
        file.write('{"id": "q0", "resp')
    plain, asked_again = generation.Answerer.__call__, []

    def watched(self, batch):
        asked_again.extend(question.id for question, _ in batch)
        return plain(self, batch)

    monkeypatch.setattr(generation.Answerer, "__call__", watched)
    assert command(*arguments(data, tmp_path)) == 0
    assert sorted(asked_again) == sorted({f"q{i}" for i in range(COUNT)} - answered)
    assert same_result(tmp_path / "vqa", alone)
    assert {p.name for p in (tmp_path / "vqa").iterdir()} == {"responses.jsonl", "scores.jsonl", "report.json"}


@pytest.mark.skipif(sys.platform != "linux", reason="the launch hides compilers as Linux finds them")
def test_processes_share_the_questions_out(data, alone, tmp_path, monkeypatch):
    """One rank dies: the other does not wait for it, and the error is told. Started again, all is answered once but a
    picture that cannot be read, and the exit status says so. Mended, the result is one process's."""
    (tmp_path / "watching_plugin.py").write_text(WATCH)
    log = tmp_path / "asked"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("ASKED", str(log))
    start = [*torchrun(), "-m", "mmdora.cli", *arguments(data, tmp_path, "--plugin", "watching_plugin")]
    result, torn = tmp_path / "vqa", data.parent / "3.png"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:100])

    monkeypatch.setenv("DIES", "1")
    died = launch(start, tmp_path, limit=200)
    assert died.returncode == 1
    assert "this rank has had enough" in died.stderr
    assert not (result / "report.json").exists()
    assert rows_of(result / "responses.1.jsonl")

    monkeypatch.delenv("DIES")
    unread = launch(start, tmp_path, limit=200)
    assert unread.returncode == 1
    assert "error: 1 of 11 questions could not be answered, such as 'q3'" in unread.stderr
    assert [row["id"] for row in rows_of(result / "failed.jsonl")] == ["q3"]
    assert len(rows_of(result / "responses.jsonl")) == COUNT - 1
    assert not (result / "report.json").exists()

    torn.write_bytes(whole)
    done = launch(start, tmp_path, limit=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_result(result, alone)
    assert not (result / "failed.jsonl").exists()
    assert {path.name for path in result.iterdir()} == {"responses.jsonl", "scores.jsonl", "report.json"}
    counts = Counter(log.read_text().split())
    assert set(counts) == {f"q{i}" for i in range(COUNT)}
    # What the two processes were at when one of them died, at two questions a batch, is asked again; nothing else is.
    assert sum(counts.values()) - COUNT <= 4
