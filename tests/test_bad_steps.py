"""Bad steps are skipped and reported; `training.ema` saves the average of the weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.dataset import TrainDataset, read_source
from data_pipelines.encoding import Encoder
from data_pipelines.ledger import Entry, Ledger
from mmdora.core.config_files import load_config
from mmdora.training import bad_steps
from mmdora.training.bad_steps import BadSteps, GuardedAdamW
from mmdora.training.batches import BatchSpec, step_samples
from tests.grid import run_in_two_processes
from tests.grid_worker import plugins_from
from tests.test_runs import command, small

# A plugin that makes the pixels of some samples NaN.
POISON = """
import re
from data_pipelines.encoding import Encoder

encode = Encoder.encode

def poisoned(self, sample, *rest):
    encoded = encode(self, sample, *rest)
    if re.search("{pattern}", sample.id):
        for key in encoded:
            if key.startswith("pixel_values"):
                encoded[key] = encoded[key] * float("nan")
    return encoded

Encoder.encode = poisoned
"""


@pytest.fixture
def poison(tmp_path):
    """Write the plugin for sample ids that match a pattern; returns the setting that loads it."""

    def write(pattern: str) -> str:
        (tmp_path / "poison.py").write_text(POISON.format(pattern=pattern))
        return "plugins=[poison]"

    with plugins_from(str(tmp_path)):
        yield write


def settings(world: Path, output: Path, *more: str, steps: int = 4) -> list[str]:
    return [
        *small(world, output, steps),
        "training.batch_size=4",
        "training.micro_batch_size=2",
        "evaluation=[]",
        *more,
    ]


def ledger(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]


def first_samples(arguments: list[str]) -> list[str]:
    """Return the ids of a run's samples in the order of its steps of four."""
    config = load_config(arguments[0], arguments[1:])
    sources = [read_source(source, config.training.seed) for source in config.data.train]
    dataset = TrainDataset(sources, Encoder(None), Ledger(Path("none"), 9, 1.0), config.training.seed)
    steps = step_samples(BatchSpec(len(dataset), 4, 2, seed=config.training.seed), 0)
    return [dataset.sample(int(i)).id for _, step in zip(range(4), steps, strict=False) for i in step]


def adapter_after(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoints/checkpoint-{step}/adapter/adapter_model.safetensors")


def check_second_step(output: Path, poisoned: str) -> list[dict]:
    """Check that step 2 of 3 was skipped; return the ledger's entries of its samples."""
    first, second, third = (adapter_after(output, step) for step in (1, 2, 3))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(second[key], third[key]) for key in first)
    assert all(tensor.isfinite().all() for tensor in third.values())
    entries = ledger(output)
    assert poisoned in [entry["id"] for entry in entries]
    assert all(entry["stage"] == "train" and entry["changed"] for entry in entries)
    assert entries[0]["reason"] == "step 2 was skipped: the loss is nan"
    return entries


def test_a_bad_step_is_skipped_and_its_samples_are_reported(world, tmp_path, poison, caplog):
    arguments = settings(world, tmp_path / "run", "training.save_every=1", "training.keep=9", steps=3)
    bad = first_samples(arguments)[5]
    assert command("train", *arguments, poison(f"^{bad}$")) == 0
    first, second = check_second_step(tmp_path / "run", bad)  # its micro-batch
    assert f"step 2 was skipped: the loss is nan; its samples: {first['id']}, {second['id']}" in caplog.text


@pytest.mark.parametrize("engine", ["zero3", *(pytest.param(e, marks=pytest.mark.slow) for e in ("null", "zero2"))])
@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")
def test_two_processes_skip_the_same_step(world, tmp_path, poison, engine):
    """Only one process has the bad sample."""
    arguments = settings(world, tmp_path / "run", "training.save_every=1", "training.keep=9", steps=3)
    bad = first_samples(arguments)[5]
    arguments += [poison(f"^{bad}$"), f"training.deepspeed={engine}"]
    run_in_two_processes(arguments, tmp_path / "run", plugins=tmp_path)
    assert len(check_second_step(tmp_path / "run", bad)) == 2


def test_too_many_bad_steps_end_the_run(world, tmp_path, poison, capsys):
    output = tmp_path / "run"
    assert command("train", *settings(world, output, poison(".*"), "training.max_bad_steps=3")) == 1
    error = capsys.readouterr().err
    assert "3 steps were skipped (training.max_bad_steps)" in error
    assert "step 3 was skipped: the loss is nan" in error
    assert len({entry["id"] for entry in ledger(output)}) == 12
    assert ledger(output)[-1]["id"] in error


def test_an_exploding_run_ends(world, tmp_path, capsys):
    arguments = ["training.learning_rate=1e4", "training.max_bad_steps=2", "training.max_grad_norm=0"]
    rates = [f"parts.{part}.learning_rate=null" for part in ("vision", "projector", "language")]
    assert command("train", *settings(world, tmp_path / "run", *arguments, *rates, steps=9)) == 1
    assert "lower training.learning_rate" in capsys.readouterr().err


def guarded_step(guard: BadSteps, loss: float, gradient: float) -> bool:
    """Take an optimizer step on one weight with two micro-batches; return whether the weight changed."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = GuardedAdamW([weight], lr=0.1)
    optimizer.guard = guard
    guard.on_step_begin(None, None, None)
    guard.add_micro_batch(torch.tensor(loss / 2), torch.tensor([0]), last=False)
    guard.add_micro_batch(torch.tensor(loss / 2), torch.tensor([1]), last=True)
    weight.grad = torch.full((2,), gradient)
    optimizer.step()
    changed = not torch.equal(weight, torch.ones(2))
    assert changed == bool(optimizer.state)  # a skipped step leaves no moments either
    guard.on_step_end(SimpleNamespace(fp16=False), SimpleNamespace(global_step=1), None, optimizer=optimizer)
    return changed


@pytest.mark.parametrize(
    ("loss", "gradient", "reason"),
    [
        (5.0, 1.0, None),
        (25.0, 1.0, "step 1 was skipped: the loss of 25 is over 20, far worse than guessing"),
        (float("inf"), 1.0, "step 1 was skipped: the loss is inf"),
        (5.0, float("nan"), "step 1 was skipped: the gradients are not finite"),
    ],
)
def test_a_bad_loss_or_gradient_skips_the_step(loss, gradient, reason):
    reported = []
    guard = BadSteps(3, 20.0, lambda indices, why: reported.append((indices, why)) or [])
    assert guarded_step(guard, loss, gradient) == (reason is None)
    assert reported == ([] if reason is None else [([0, 1], reason)])


@pytest.mark.parametrize(("loss", "counted"), [(5.0, 0), (float("nan"), 1)])
def test_in_float16_gradients_may_overflow_but_the_loss_may_not(loss, counted):
    """DeepSpeed and torch skip such steps themselves, without calling the optimizer."""
    guard = BadSteps(3, 20.0, lambda indices, why: [])
    guard.on_step_begin(None, None, None)
    guard.add_micro_batch(torch.tensor(loss), torch.tensor([0]), last=True)
    args, engine = SimpleNamespace(fp16=True), SimpleNamespace(step_was_skipped=True)
    guard.on_step_end(args, SimpleNamespace(global_step=1), None, optimizer=engine)
    assert guard.count == counted


def test_a_process_skips_a_step_that_is_bad_in_another_process(monkeypatch):
    """Under ZeRO only the process that holds a partition sees its gradients."""
    monkeypatch.setattr(bad_steps, "any_rank", lambda flag: True)
    assert not guarded_step(BadSteps(3, 20.0, lambda indices, why: []), loss=5.0, gradient=1.0)


def test_a_changed_sample_is_also_reported_for_its_bad_step(tmp_path):
    (tmp_path / "skipped.jsonl").touch()
    entries = Ledger(tmp_path / "skipped.jsonl", 9, 1.0)
    for stage in ("encode", "train", "train"):
        entries.record(Entry("a", "data.json", stage, "a reason", changed=True))
    assert [entry["stage"] for entry in ledger(tmp_path)] == ["encode", "train"]


def test_the_average_is_the_runs_adapter(world, tmp_path):
    """B starts at zero, so its average follows from the checkpoints alone. Resuming continues the average."""
    output = tmp_path / "run"
    arguments = settings(world, output, "training.ema=0.5", "training.save_every=1", "training.keep=9", steps=3)
    assert command("train", *arguments) == 0
    final = load_file(output / "adapter" / "adapter_model.safetensors")
    steps = [adapter_after(output, step) for step in (1, 2, 3)]
    average = {key: torch.zeros_like(tensor) for key, tensor in final.items() if ".lora_B" in key}
    assert average
    for number, weights in enumerate(steps, start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        average = {key: decay * value + (1 - decay) * weights[key] for key, value in average.items()}
    for folder in ("checkpoints/checkpoint-3", "adapter"):
        shutil.rmtree(output / folder)
    assert command("train", *arguments[:-1], "training.keep=1", "--resume") == 0  # from step 2
    resumed = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[key], final[key]) for key in final)
    for key, value in average.items():
        torch.testing.assert_close(final[key], value, msg=key)
        assert not torch.equal(final[key], steps[-1][key])
