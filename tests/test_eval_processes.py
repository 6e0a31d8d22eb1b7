"""`mmdora eval` in several processes: they share the questions, and an evaluation that was killed continues."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from eval import generation
from tests.eval_worker import Plan
from tests.grid import free_port
from tests.media import write_image
from tests.processes import ranks, wait_for_all
from tests.test_runs import command

COUNT = 11
IDS = {f"q{i}" for i in range(COUNT)}
RESULT_FILES = {"responses.jsonl", "scores.jsonl", "report.json"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for i in range(COUNT):
        text = ("What color is the circle?", "Is there a red square?", "How many objects are there in it?")[i % 3]
        turns = [{"from": "human", "value": text if i == 4 else f"<image>\n{text}"}, {"from": "gpt", "value": "red"}]
        rows.append({"id": f"q{i}", "conversations": turns} | ({} if i == 4 else {"image": f"{i}.png"}))
        write_image(folder / f"{i}.png", seed=i, size=(64, 64))
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def arguments(data: Path, out: Path) -> list[str]:
    options = ["--benchmark", "vqa", "--data", str(data), "--batch-size", "2", "--out", str(out)]
    return ["eval", "assets/tiny-llava", *options]


@pytest.fixture(scope="module")
def single(data, tmp_path_factory) -> Path:
    """The result of one process."""
    out = tmp_path_factory.mktemp("single")
    assert command(*arguments(data, out)) == 0
    return out / "vqa"


def run_plan(plan: Plan, folder: Path) -> tuple[list[subprocess.CompletedProcess[str]], list[list[int]]]:
    """Run a plan in two processes; return their ends, and each rank's exit codes for ranks that finished."""
    file = folder / "plan.json"
    file.write_text(json.dumps(asdict(plan)))
    done = wait_for_all(ranks(["-m", "tests.eval_worker", str(file)], free_port()), limit=300)
    return done, [json.loads(path.read_text()) for path in sorted(folder.glob("plan.json.rank*"))]


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def same_result(first: Path, second: Path) -> bool:
    reports = [json.loads((result / "report.json").read_text()) for result in (first, second)]
    files = [(result / name).read_text() for result in (first, second) for name in ("responses.jsonl", "scores.jsonl")]
    return files[:2] == files[2:] and reports[0] == reports[1]


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory) -> Path:
    """The output of two processes of which rank 1 was killed (SIGKILL) when its second batch began."""
    folder = tmp_path_factory.mktemp("killed")
    plan = Plan(arguments(data, folder), str(folder / "log"), kill_rank=1)
    done, _ = run_plan(plan, folder)
    assert done[1].returncode == -signal.SIGKILL
    assert not (folder / "vqa" / "report.json").exists()
    assert len(rows_of(folder / "vqa" / "responses.1.jsonl")) == 2  # the first batch is on the disk
    return folder


def test_one_process_continues_after_a_kill(data, single, killed, tmp_path, monkeypatch):
    """Only missing answers are generated, although the last line is incomplete; the result is that of one process."""
    result = tmp_path / "vqa"
    shutil.copytree(killed / "vqa", result)
    answered = {row["id"] for file in result.glob("responses*.jsonl") for row in rows_of(file)}
    with (result / "responses.jsonl").open("a") as file:
        file.write('{"id": "q0", "resp')
    answer, generated = generation.Answerer.__call__, []

    def watched(self, batch):
        generated.extend(question.id for question, _ in batch)
        return answer(self, batch)

    monkeypatch.setattr(generation.Answerer, "__call__", watched)
    assert command(*arguments(data, tmp_path)) == 0
    assert sorted(generated) == sorted(IDS - answered)
    assert same_result(result, single)
    assert {path.name for path in result.iterdir()} == RESULT_FILES


def test_two_processes_continue_after_a_kill(data, single, killed, tmp_path):
    """An unreadable image fails the evaluation, and all other answers are kept. Once the image is repaired, the result
    is that of one process."""
    shutil.copytree(killed / "vqa", tmp_path / "vqa")
    result, image, whole = tmp_path / "vqa", data.parent / "3.png", tmp_path / "whole.png"
    shutil.copy(image, whole)
    image.write_bytes(whole.read_bytes()[:100])
    plan = Plan(arguments(data, tmp_path), str(killed / "log"), reruns=[[str(whole), str(image), free_port()]])
    done, codes = run_plan(plan, tmp_path)
    assert codes == [[1, 0]] * 2, done[0].stderr[-3000:]
    assert "error: 1 of 11 questions could not be answered, such as 'q3'" in done[0].stderr
    assert [process.returncode for process in done] == [0, 0]
    assert same_result(result, single)
    assert {path.name for path in result.iterdir()} == RESULT_FILES
    generated = Counter((killed / "log").read_text().split())
    assert set(generated) == IDS
    # Only the batches that were in progress at the kill, of two questions each, are generated again.
    assert sum(generated.values()) - COUNT <= 4
