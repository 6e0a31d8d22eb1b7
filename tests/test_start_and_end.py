"""How a run starts and ends: failed starts, Ctrl-C, and what it prints without a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from eval.generation import Answerer
from mmdora.training.signals import StopOnSignal
from tests.media import write_image
from tests.test_runs import command

QUESTIONS = 3
ANSWERS_KEPT = "the base model's answers so far are kept"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three samples with an image, which are also the questions."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(QUESTIONS):
        turns = [{"from": "human", "value": "<image>\nWhat color is it?"}, {"from": "gpt", "value": "red"}]
        rows.append({"id": f"q{i}", "image": f"{i}.png", "conversations": turns})
        write_image(folder / f"{i}.png", seed=i, size=(48, 48))
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    """A run of two steps that evaluates the base model and the adapter, question by question."""
    return [
        "train",
        "quickstart",
        f"data.train=[{{path: {data}, format: llava}}]",
        "data.num_workers=1",
        f"training.output={output}",
        "training.max_steps=2",
        "training.batch_size=2",
        "training.micro_batch_size=2",
        f"evaluation=[{{name: colors, benchmark: vqa, data: {data}, format: llava, batch_size: 1, before: true}}]",
        *more,
    ]


@dataclass
class Asked:
    """Counts the batches of questions; `stop_at` of them gets SIGINT instead of an answer."""

    questions: list[str] = field(default_factory=list)
    stop_at: int = 0


@pytest.fixture(scope="module")
def asked():
    plain, record = Answerer.__call__, Asked()

    def watched(self, batch):
        record.stop_at -= 1
        if record.stop_at == 0:
            os.kill(os.getpid(), signal.SIGINT)
        record.questions += [question.id for question, _ in batch]
        return plain(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "__call__", watched)
        yield record


@dataclass
class Command:
    """A command's output, its exit code, and the questions that it asked the model."""

    code: int
    out: str
    err: str
    questions: list[str]
    answers_before: int  # in eval/before once it ended
    has_adapter: bool


@dataclass
class Story:
    """A run that Ctrl-C stops during each of its evaluations, and that is continued each time."""

    output: Path
    base: Command
    after: Command
    resumed: Command


@pytest.fixture(scope="module")
def story(data, asked, tmp_path_factory) -> Story:
    output = tmp_path_factory.mktemp("runs") / "run"

    def run(stop_at: int, *more: str) -> Command:
        asked.questions, asked.stop_at = [], stop_at
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = command(*arguments(data, output, *more))
        answers = output / "eval" / "before" / "colors" / "responses.jsonl"
        count = len(answers.read_text().splitlines()) if answers.exists() else 0
        has_adapter = (output / "adapter").exists()
        return Command(code, out.getvalue(), err.getvalue(), list(asked.questions), count, has_adapter)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        base = run(2)
        after = run(QUESTIONS - len(base.questions) + 2)
        return Story(output, base, after, run(0, "--resume"))


def test_ctrl_c_in_the_base_evaluation_keeps_the_answers(story):
    assert story.base.code == 130
    assert story.base.answers_before == 1
    assert story.base.err.strip().startswith("interrupted: " + ANSWERS_KEPT)
    assert len(story.base.err.strip().splitlines()) == 1


def test_the_same_command_continues_a_start_that_was_interrupted(story):
    """Without --resume, and without asking a question twice."""
    assert len(story.after.questions) == QUESTIONS - 1 + 1
    assert story.after.answers_before == QUESTIONS
    assert (story.output / "eval" / "before" / "colors" / "report.json").exists()


def test_ctrl_c_in_the_last_evaluation_keeps_adapter_and_answers(story):
    assert story.after.code == 130
    assert story.after.has_adapter
    assert "the same command with --resume finishes the evaluation" in story.after.err
    assert "Traceback" not in story.after.err
    assert story.resumed.code == 0
    assert len(story.resumed.questions) == QUESTIONS - 1
    assert (story.output / "report.html").exists()


def test_without_a_terminal_steps_and_evaluations_are_plain_lines(story):
    lines = story.after.out.splitlines()
    metrics = r"  loss \d+\.\d{3}  lr \S.*  [\d,]+ tokens/s  [\d.,]+ samples/s  "
    assert any(re.fullmatch(rf"step 1/2{metrics}eta \d+:\d\d", line) for line in lines), story.after.out
    assert any(re.fullmatch(rf"step 2/2{metrics}in \d+:\d\d", line) for line in lines), story.after.out
    assert any(re.match(r"colors, before  3/3  in", line) for line in lines), story.after.out
    assert any(re.match(r"colors, after  3/3  in", line) for line in story.resumed.out.splitlines())


def test_tables_have_the_usual_column_names(story):
    assert re.search(r"part +method +adapted +trainable params +all params +%", story.after.out)
    assert re.search(r"part +params +lr +weight decay", story.after.out)
    assert re.search(r"benchmark +n +before +after +baseline", story.resumed.out)
    assert max(map(len, story.resumed.out.splitlines()[:12])) <= 80


def test_the_log_shows_compute_threads_and_loading_processes(story):
    log = (story.output / "logs" / "rank-0.log").read_text()
    (threads, workers) = re.search(r"compute threads: (\d+), loading processes: (\d+)", log).groups()
    assert int(workers) == 1
    assert int(threads) + int(workers) <= max(2, len(os.sched_getaffinity(0)))


def test_ctrl_c_in_mmdora_eval_keeps_the_answers(story, data, asked, tmp_path, capsys):
    ask = ["eval", "assets/tiny-llava", "--benchmark", "vqa", "--data", str(data), "--batch-size", "1"]
    asked.questions, asked.stop_at = [], 2
    assert command(*ask, "--out", str(tmp_path)) == 130
    error = capsys.readouterr().err.strip()
    assert error == f"interrupted: the answers so far are kept in {tmp_path}; the same command continues from them"
    asked.questions, asked.stop_at = [], 0
    assert command(*ask, "--out", str(tmp_path)) == 0
    assert len(asked.questions) == QUESTIONS - 1


FAILURES = {
    "a part that does not exist": (["parts.visoin={method: dora}"], "Did you mean 'vision'"),
    "targets that match nothing": (["parts.language.targets=[no_such_proj]"], "no_such_proj"),
    "a model that does not load": (["model.path=EMPTY"], "EMPTY"),
    "data that cannot be parsed": (["data.train.0.path=TORN"], "TORN"),
    "too many invalid samples": (
        ["data.train=[{path: INVALID, format: llava, media: MEDIA}]"],
        "more than data.max_skipped",
    ),
    "questions whose images are missing": (["evaluation.0.data=IMAGELESS"], "media files are missing"),
    "no disk space": (["evaluation=[]"], "no disk space"),
}


@pytest.fixture
def faulty(data, tmp_path, monkeypatch) -> dict[str, Path]:
    """Files and folders with a fault each, by the names that FAILURES uses."""
    paths = {name: tmp_path / f"faulty-{name.lower()}" for name in ("EMPTY", "TORN", "INVALID", "IMAGELESS")}
    paths["EMPTY"].mkdir()
    paths["TORN"] = paths["TORN"].with_suffix(".json")
    paths["TORN"].write_text('[{"id": 1, "conversations"')
    rows = json.loads(data.read_text())
    paths["INVALID"] = paths["INVALID"].with_suffix(".json")
    paths["INVALID"].write_text(json.dumps([rows[0], {"id": "x"}, {"id": "y"}]))
    paths["MEDIA"] = data.parent
    paths["IMAGELESS"].mkdir()
    shutil.copy(data, paths["IMAGELESS"] / "rows.json")
    paths["IMAGELESS"] /= "rows.json"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("mmdora.core.run_directory.shutil.disk_usage", lambda _: usage._replace(free=1000))
    return paths


@pytest.mark.parametrize(("overrides", "message"), FAILURES.values(), ids=FAILURES)
def test_a_failed_start_leaves_no_run_directory(data, faulty, tmp_path, capsys, overrides, message):
    for name, path in faulty.items():
        overrides = [override.replace(name, str(path)) for override in overrides]
        message = message.replace(name, str(path))
    output = tmp_path / "runs" / "run"
    assert command(*arguments(data, output, "evaluation.0.before=false", *overrides)) != 0
    assert message in capsys.readouterr().err
    assert not output.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_start_with_overwrite_keeps_the_old_run_in_its_place(story, data, faulty, tmp_path, capsys):
    """Before the new directory is created (an unknown part), and after (no disk space)."""
    output = tmp_path / "runs" / "run"
    shutil.copytree(story.output, output)
    before = contents(output)
    for more in (["parts.visoin={method: dora}"], ["evaluation=[]"]):
        assert command(*arguments(data, output, "--overwrite", *more)) == 2
        assert [path.name for path in output.parent.iterdir()] == ["run"]
        assert contents(output) == before
    assert "no disk space" in capsys.readouterr().err


def test_a_failed_start_with_resume_does_not_change_the_run(story, data, faulty, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(story.output, output)
    before = contents(output)
    assert command(*arguments(data, output, "--resume", "training.keep=5", "evaluation=[]")) == 2
    assert "no disk space" in capsys.readouterr().err
    after = contents(output)
    assert {name for name in before if before[name] != after.get(name)} <= {"logs/rank-0.log"}
    assert before.keys() == after.keys()


def test_ctrl_c_before_anything_was_done_leaves_nothing(data, asked, tmp_path, capsys):
    asked.questions, asked.stop_at = [], 1
    assert command(*arguments(data, tmp_path / "run")) == 130
    assert capsys.readouterr().err.strip() == "interrupted: training has not begun, and nothing was written"
    assert not (tmp_path / "run").exists()


def test_answers_of_the_base_model_survive_a_start_that_fails(data, asked, tmp_path, capsys):
    """A question that cannot be answered: the directory with the other answers is kept, and the start can be repeated;
    a live process that holds the directory is not disturbed."""
    shutil.copytree(data.parent, tmp_path / "data")
    rows, image = tmp_path / "data" / data.name, tmp_path / "data" / "1.png"
    image.write_bytes(image.read_bytes()[:60])
    output = tmp_path / "run"
    for count in (QUESTIONS - 1, 0):
        asked.questions, asked.stop_at = [], 0
        assert command(*arguments(rows, output)) == 1
        assert len(asked.questions) == count
        assert f"{ANSWERS_KEPT} in {output}; the same command continues from them" in capsys.readouterr().err
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{lock}; input()", str(output / "logs" / "rank-0.log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "locked\n"
    assert command(*arguments(rows, output)) == 2
    assert "already holds a run" in capsys.readouterr().err
    holder.communicate("\n")


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("mmdora.training.signals.time", clock)
    with StopOnSignal("stop") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same key press, forwarded by a wrapper
        clock.now = 1.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT


@pytest.mark.parametrize(
    ("numbers", "on_sigterm", "stopped", "saves"),
    [
        ([signal.SIGTERM], "save", signal.SIGTERM, True),
        ([signal.SIGTERM], "stop", signal.SIGTERM, False),
        ([signal.SIGINT], "stop", signal.SIGINT, True),
        ([signal.SIGINT, signal.SIGTERM], "stop", signal.SIGINT, True),
    ],
)
def test_what_a_signal_does_at_the_end_of_the_step(numbers, on_sigterm, stopped, saves, capfd):
    control = TrainerControl()
    with StopOnSignal(on_sigterm) as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
        stop.on_step_end(SimpleNamespace(device="cpu"), None, control)
    assert control.should_training_stop
    assert (stop.stopped, stop.saves, control.should_save) == (stopped, saves, saves)
    assert ("press it again to stop at once" in capfd.readouterr().err) == (signal.SIGINT in numbers)
