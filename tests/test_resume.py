"""Resuming a run that was killed, stopped by a signal, or met a damaged checkpoint or a full disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.dataset import read_source
from mmdora.core.atomic import clear_leftovers, damage, write_manifest, written_aside
from mmdora.core.config import SourceConfig
from mmdora.core.run_directory import RunDir
from mmdora.training.checkpoints import rotate, write_shards
from tests.processes import python
from tests.test_runs import command

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
STEPS, EPOCH = 7, 3  # steps of the run and of an epoch


@pytest.fixture(scope="module", autouse=True)
def fixed_threads() -> Iterator[None]:
    """Runs with and without workers use the same number of compute threads, which bit-exact equality needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield


@pytest.fixture(scope="module")
def settings(world, tmp_path_factory) -> Callable[..., list[str]]:
    """Settings of a run of two and a third epochs, with dropout, images and a sample that cannot be used."""
    read_source(SourceConfig(path=f"{world}/counting_held_out.json", format="shapes"))
    rows = json.loads((world / "counting_held_out.json").read_text())[:24]
    rows[5]["image"] = "gone.png"
    data = tmp_path_factory.mktemp("data") / "rows.json"
    data.write_text(json.dumps(rows))
    benchmark = f"name: counting, benchmark: vqa, data: {data}, where: {{}}, media: {world}, limit: 5, batch_size: 2"

    def build(output: Path, *more: str) -> list[str]:
        return [
            "quickstart",
            f"data.train=[{{path: {data}, format: llava, media: {world}}}]",
            "data.max_skipped=0.5",
            "data.num_workers=0",
            f"training.output={output}",
            f"training.max_steps={STEPS}",
            "training.batch_size=8",
            "training.micro_batch_size=4",
            "training.save_every=2",
            "training.keep=9",
            "parts.language.dropout=0.1",
            f"evaluation=[{{{benchmark}}}]",
            *more,
        ]

    return build


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert command("train", *settings(output)) == 0
    return output


def until(whole: Path, output: Path, step: int) -> None:
    """Copy the run as if it had been killed after a checkpoint, in the middle of writing metrics.jsonl."""
    shutil.copytree(whole, output)
    for name in ("adapter", "eval", "report.html", "loss.png"):
        path = output / name
        _ = shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (output / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')


def separate(arguments: list[str], end: str = "", **settings) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process and process group. `end`: see killer.py."""
    plugin = ["plugins=[tests.killer]"] if end else []
    return python("train.py", *arguments, *plugin, environment={"END": end}, **settings)


def metrics(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in ("step", "epoch", "loss", "grad_norm", "learning_rate")) for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def check_equal(run: Path, whole: Path) -> None:
    """Assert equal weights, bit for bit, and equal records: each step and each skipped sample once."""
    resumed, expected = weights(run), weights(whole)
    assert resumed.keys() == expected.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], expected[name])] == []
    assert metrics(run) == metrics(whole)
    assert (run / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
    scores = "eval/counting/scores.jsonl"
    assert (run / scores).read_text() == (whole / scores).read_text()
    state = [(r / f"checkpoints/checkpoint-{STEPS}/state.json").read_text() for r in (run, whole)]
    assert state[0] == state[1]


def steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints, and assert that nothing else is beside them."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in (run / "checkpoints").iterdir())


def test_killed_three_times(settings, whole, tmp_path):
    """In the forward pass of a step, while a checkpoint is written, and while answers are generated."""
    run, arguments = tmp_path / "run", settings(tmp_path / "run", "training.keep=2")
    assert len((whole / "skipped.jsonl").read_text().splitlines()) == 1
    for end, expected in (
        ("forward 6 KILL", [2]),  # the second micro-batch of step 3
        ("trainer_state.json 1 KILL", [2, "aside"]),  # of checkpoint-4
        ("forward 16 KILL", [6, 7]),  # ten are of steps 3 to 7
    ):
        done = separate([*arguments, *(["--resume"] if run.exists() else [])], end)
        assert done.returncode == -9, done.stdout + done.stderr
        names = [p.name for p in (run / "checkpoints").iterdir()]
        assert len(names) == len(expected), names
        assert {f"checkpoint-{n}" for n in expected if n != "aside"} <= set(names)
    assert not (run / "report.html").exists()
    assert list((run / "eval" / "counting").glob("responses*.jsonl"))
    assert command("train", *arguments, "--resume") == 0
    check_equal(run, whole)
    assert steps(run) == [6, 7]


def test_from_the_end_of_an_epoch_and_with_workers(settings, whole, tmp_path):
    """With two workers; the uninterrupted run had none."""
    until(whole, tmp_path / "run", 2 * EPOCH)
    assert command("train", *settings(tmp_path / "run", "data.num_workers=2"), "--resume") == 0
    check_equal(tmp_path / "run", whole)


def test_resuming_a_finished_run_changes_nothing(settings, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "done")
    assert command("train", *settings(tmp_path / "done"), "--resume") == 0
    check_equal(tmp_path / "done", whole)


def test_resuming_without_a_checkpoint_begins_at_the_first_step(settings, whole, tmp_path):
    """Killed before the first checkpoint, or before the config was written."""
    until(whole, tmp_path / "run", 0)
    (tmp_path / "run" / "config.yaml").unlink()
    assert command("train", *settings(tmp_path / "run"), "--resume") == 0
    check_equal(tmp_path / "run", whole)
    assert RunDir(tmp_path / "run").config().training.max_steps == STEPS


@pytest.mark.parametrize(
    ("action", "number", "code", "line"),
    [
        ("save", "TERM", 143, "stopped by SIGTERM after step 3; checkpoint-3 is saved"),
        ("stop", "INT", 130, "stopped by Ctrl-C after step 3; checkpoint-3 is saved"),
        ("stop", "TERM", 143, "stopped by SIGTERM after step 3; no checkpoint is saved"),
    ],
)
def test_a_signal_stops_the_run_after_the_step(settings, whole, tmp_path, action, number, code, line):
    """The signal goes to the whole process group, as from Slurm or a terminal; the workers still deliver the samples of
    the step, and print nothing."""
    run, more = tmp_path / "run", (f"training.on_sigterm={action}", "data.num_workers=2")
    done = separate(settings(run, *more), f"forward 5 {number}")
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.count(f"{line}. The same command with --resume continues") == 1
    assert "Traceback" not in done.stderr
    assert [row[0] for row in metrics(run)] == [1, 2, 3]
    assert steps(run) == ([2, 3] if "checkpoint-3" in line else [2])
    assert not (run / "adapter").exists()
    if action == "save":
        assert command("train", *settings(run), "--resume") == 0
        check_equal(run, whole)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(settings, whole, tmp_path, capsys, caplog):
    run = tmp_path / "run"
    until(whole, run, 6)
    piece = run / "checkpoints" / "checkpoint-6" / "optimizer-00000.safetensors"
    content = bytearray(piece.read_bytes())
    content[-100] ^= 1
    piece.write_bytes(content)
    assert command("train", *settings(run, "data.num_workers=2"), "--resume") == 0  # from the middle of an epoch
    assert "checkpoint-6 is damaged: optimizer-00000.safetensors was changed" in caplog.text
    assert "continues from checkpoint-4" in caplog.text
    check_equal(run, whole)
    for path in (run / "checkpoints").iterdir():
        (path / "trainer_state.json").unlink()
    capsys.readouterr()
    assert command("train", *settings(run), "--resume") == 2
    error = capsys.readouterr().err
    assert "every checkpoint is damaged" in error
    assert "checkpoint-2: trainer_state.json is missing" in error


def test_a_full_disk_keeps_the_earlier_checkpoints(settings, whole, tmp_path):
    """No file can grow beyond 1.2 times the adapter; the optimizer state would."""
    run = tmp_path / "run"
    until(whole, run, 4)
    most = int(1.2 * (whole / "adapter" / "adapter_model.safetensors").stat().st_size)
    done = separate([*settings(run), "--resume"], max_file_size=most)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "checkpoint-6 cannot be written" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps(run) == [2, 4]
    assert command("train", *settings(run), "--resume") == 0
    check_equal(run, whole)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["training.seed=4", "training.batch_size=4"], ["training.seed: 3, now 4", "training.batch_size: 8, now 4"]),
        (["parts.vision.rank=8"], ["parts.vision.rank: 16, now 8"]),
        (["data.train.0.weight=2"], ["data.train.0.weight: 1.0, now 2.0"]),
        (["model.pad_to_square=true"], ["model.pad_to_square: False, now True"]),
        (["training.max_steps=9"], ["training.max_steps: 7, now 9", "only with lr_scheduler constant"]),
    ],
)
def test_settings_that_change_the_training_are_refused(settings, whole, capsys, more, named):
    before = (whole / "config.yaml").read_text()
    assert command("train", *settings(whole, *more), "--resume") == 2
    error = capsys.readouterr().err
    assert all(text in error for text in named), error
    assert (whole / "config.yaml").read_text() == before


def test_settings_that_may_change(settings, tmp_path):
    """A run with a constant learning rate may become longer; save_every and micro_batch_size may change."""
    run = tmp_path / "run"
    arguments = settings(run, "training.lr_scheduler=constant", "training.warmup_ratio=0", "evaluation=[]")
    assert command("train", *arguments, "training.max_steps=2") == 0
    more = ["training.save_every=1", "training.micro_batch_size=2", "training.max_steps=4"]
    assert command("train", *arguments, *more, "--resume") == 0
    assert steps(run) == [2, 3, 4]
    assert [row[0] for row in metrics(run)] == [1, 2, 3, 4]
    assert RunDir(run).config().training.max_steps == 4


def test_checkpoints_are_small(whole):
    """They hold the adapter and AdamW's two moments, and no frozen weights."""
    folder = whole / "checkpoints" / f"checkpoint-{STEPS}"
    adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    state = sum(path.stat().st_size for path in folder.glob("optimizer-*"))
    assert state < 2.2 * adapter
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - adapter - state < 100_000


def test_pieces_have_a_bounded_size(tmp_path):
    tensors = {f"exp_avg.{i}": torch.full((1000,), float(i)) for i in range(10)}
    write_shards(tmp_path, iter(tensors.items()), max_bytes=10_000)
    files = sorted(tmp_path.iterdir())
    assert [len(load_file(path)) for path in files] == [3, 3, 3, 1]
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_rotation_keeps_the_best(tmp_path):
    for step in (1, 2, 3, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    rotate(tmp_path, newest=4, keep=2, best=1)  # 10 is later than the checkpoint that the run resumed from
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint-{name}" for name in ("1", "3", "4", "mine")
    ]


def test_folders_are_replaced_atomically(tmp_path):
    """Whenever around the renames a process is killed."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "file").write_text("old")
    with pytest.raises(FileNotFoundError), written_aside(folder) as aside:
        (aside / "file").write_text((tmp_path / "gone").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    folder.rename(tmp_path / f".adapter.{dead.pid}.old")  # between the two renames
    (tmp_path / f".adapter.{dead.pid}.new").mkdir()
    (tmp_path / f".other.{os.getppid()}.new").mkdir()  # of a live process
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".other.{os.getppid()}.new", "adapter"]
    assert (folder / "file").read_text() == "old"
    with written_aside(folder) as aside:
        (aside / "file").write_text("new")
        write_manifest(aside)
    assert (folder / "file").read_text() == "new"
    assert damage(folder) is None
    (folder / "file").write_text("odd")
    assert damage(folder) == "file was changed (its SHA-256 differs)"
