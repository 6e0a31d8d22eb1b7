"""`training.patience` and `training.warmup_steps`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from mmdora.apps import during_training
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from mmdora.core.resuming import check_resumable
from mmdora.core.run_directory import checkpoints_in
from mmdora.training.arguments import training_arguments
from tests.grid import run_in_two_processes
from tests.test_evaluating import adapter_of, lines_of, same
from tests.test_runs import command, small


def stopping(world: Path, output: Path, patience: int) -> list[str]:
    """The arguments of a run of eight steps that is evaluated and saved after each."""
    return [
        *small(world, output, steps=8),
        "training.batch_size=4",
        "training.save_every=1",
        "training.keep=9",
        f"data.validation=[{{path: {world}/counting_held_out.json, format: shapes, take: 'first:2'}}]",
        "training.evaluate_every=1",
        "training.best=loss",
        f"training.patience={patience}",
        "evaluation=[]",
    ]


@pytest.fixture
def scripted(monkeypatch):
    """Make the validation losses of steps 1, 2, ... those of a list."""

    def script(losses: list[float]) -> None:
        step_loss = lambda trainer, *_: (losses[trainer.state.global_step - 1], 9)  # noqa: E731
        monkeypatch.setattr(during_training, "validation_loss", step_loss)

    return script


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in lines_of(run) if "loss" in line]


def test_a_run_ends_and_resumes_with_the_exact_count(world, tmp_path, scripted):
    scripted([3.0, 2.0, 2.5, 1.0, math.nan, 1.0, 0.9, 0.8])  # NaN and an equal loss are no improvement
    output = tmp_path / "run"
    assert command("train", *stopping(world, output, 2)) == 0
    assert steps_of(output) == [1, 2, 3, 4, 5, 6]
    assert json.loads((output / "best" / "best.json").read_text())["step"] == 4
    assert max(checkpoints_in(output / "checkpoints")) == 6
    ended = adapter_of(output)

    for path in (output / "adapter", output / "checkpoints" / "checkpoint-6"):
        shutil.rmtree(path)  # as if it was killed when one evaluation had been counted
    assert command("train", *stopping(world, output, 2), "--resume") == 0
    assert steps_of(output) == [1, 2, 3, 4, 5, 6]
    assert same(adapter_of(output), ended)

    assert command("train", *stopping(world, output, 2), "--resume") == 0  # it has ended: no step more
    assert steps_of(output) == [1, 2, 3, 4, 5, 6]
    assert same(adapter_of(output), ended)
    assert command("train", *stopping(world, output, 3), "--resume") == 0
    assert steps_of(output) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert json.loads((output / "best" / "best.json").read_text())["step"] == 8


@pytest.mark.slow
def test_two_processes_end_together(world, tmp_path):
    """With learning rate 0 the loss is constant, so the second evaluation is no improvement."""
    output = tmp_path / "run"
    rates = [f"parts.{part}.learning_rate=0" for part in ("vision", "projector", "language")]
    settings = [*stopping(world, output, 1), "training.micro_batch_size=2", "training.deepspeed=zero3", *rates]
    run_in_two_processes(settings, output)
    assert steps_of(output) == [1, 2]
    assert max(checkpoints_in(output / "checkpoints")) == 2


def test_patience_needs_a_metric():
    with pytest.raises(UserError, match=r"'training.patience' needs 'training.best'"):
        load_config("quickstart", ["training.patience=2"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [([], 3), (["training.warmup_steps=0"], 0), (["training.warmup_steps=1"], 1), (["training.warmup_steps=40"], 40)],
)
def test_warmup_steps_take_the_place_of_the_ratio(settings, expected, tmp_path):
    config = load_config("quickstart", ["training.warmup_ratio=0.03", *settings])
    assert training_arguments(config, tmp_path).get_warmup_steps(100) == expected


def test_the_learning_rate_rises_over_the_warmup_steps(world, tmp_path):
    settings = [*small(world, tmp_path / "run"), "evaluation=[]", "training.lr_scheduler=constant"]
    assert command("train", *settings, "training.warmup_steps=4", "training.batch_size=4") == 0
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "run")]
    peak = load_config("quickstart", []).training.learning_rate
    assert [rate / peak for rate in rates] == pytest.approx([0.0, 0.25, 0.5, 0.75])


def test_a_constant_rate_after_warmup_steps_may_be_resumed_for_longer():
    arguments = ["training.lr_scheduler=constant", "training.warmup_steps=5", "training.max_steps=20"]
    begun = load_config("quickstart", arguments)
    check_resumable(begun, load_config("quickstart", [*arguments, "training.max_steps=30"]), Path("run"))
    with pytest.raises(UserError, match=r"training\.warmup_steps"):
        check_resumable(begun, load_config("quickstart", [*arguments, "training.warmup_steps=6"]), Path("run"))
