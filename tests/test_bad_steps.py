"""Steps that would ruin the weights are not taken; and the average of the steps that are."""

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
from mmdora.training.bad_steps import BadSteps
from mmdora.training.batches import Batching, step_samples
from tests.grid import launch
from tests.test_runs import command, small
from tests.test_zero import torchrun

# A module of one's own, as `plugins` takes it: what the encoder makes of some samples becomes not a number.
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
def poison(tmp_path, monkeypatch):
    """Write the module, for ids that match a pattern; it is gone after the test."""
    monkeypatch.setattr(Encoder, "encode", Encoder.encode)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(pattern: str) -> str:
        (tmp_path / "poison.py").write_text(POISON.format(pattern=pattern))
        return "plugins=[poison]"

    yield write
    sys.modules.pop("poison", None)


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
    """The ids of a run's samples in the order of its steps of four."""
    config = load_config(arguments[0], arguments[1:])
    sources = [read_source(source, config.training.seed) for source in config.data.train]
    dataset = TrainDataset(sources, Encoder(None), Ledger(Path("none"), 9, 1.0), config.training.seed)
    steps = step_samples(Batching(len(dataset), 4, 2, seed=config.training.seed), 0)
    return [dataset.sample(int(i)).id for _, step in zip(range(4), steps, strict=False) for i in step]


def check_second_step(output: Path, poisoned: str) -> list[dict]:
    """Steps 1 and 3 were taken, and 2 was not; returns its samples' lines of the ledger."""
    adapters = [load_file(output / f"checkpoints/checkpoint-{n}/adapter/adapter_model.safetensors") for n in (1, 2, 3)]
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    assert any(not torch.equal(adapters[1][key], adapters[2][key]) for key in adapters[0])
    assert all(tensor.isfinite().all() for tensor in adapters[2].values())
    lost = ledger(output)
    assert poisoned in [entry["id"] for entry in lost]
    assert all(entry["stage"] == "train" and entry["changed"] for entry in lost)
    assert lost[0]["reason"] == "step 2 was not taken: its loss is nan"
    return lost


def test_a_bad_step_is_not_taken_and_its_samples_are_told(world, tmp_path, poison, caplog):
    """One sample in its one step: everything else is learnt, and the log and the ledger name it."""
    arguments = settings(world, tmp_path / "run", "training.save_every=1", "training.keep=9")
    bad = first_samples(arguments)[5]
    assert command("train", *arguments, poison(f"^{bad}$")) == 0
    first, second = check_second_step(tmp_path / "run", bad)  # its micro-batch
    assert f"step 2 was not taken: its loss is nan; its samples: {first['id']}, {second['id']}" in caplog.text


@pytest.mark.parametrize("engine", ["zero3", *(pytest.param(e, marks=pytest.mark.slow) for e in ("null", "zero2"))])
@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")
def test_two_processes_leave_the_same_step_out(world, tmp_path, poison, monkeypatch, engine):
    """One process meets the sample; none of them takes the step."""
    arguments = settings(world, tmp_path / "run", "training.save_every=1", "training.keep=9")
    bad = first_samples(arguments)[5]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments += [poison(f"^{bad}$"), f"training.deepspeed={engine}"]
    done = launch([*torchrun(), "train.py", *arguments], tmp_path, limit=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(check_second_step(tmp_path / "run", bad)) == 2


def test_too_many_bad_steps_end_the_run(world, tmp_path, poison, capsys):
    output = tmp_path / "run"
    assert command("train", *settings(world, output, poison(".*"), "training.max_bad_steps=3")) == 1
    said = capsys.readouterr().err
    assert "3 steps would have ruined the model (training.max_bad_steps)" in said
    assert "step 3 was not taken: its loss is nan" in said
    assert len({entry["id"] for entry in ledger(output)}) == 12
    assert ledger(output)[-1]["id"] in said


def test_an_exploding_run_ends(world, tmp_path, capsys):
    arguments = ["training.learning_rate=1e4", "training.max_bad_steps=2", "training.max_grad_norm=0"]
    rates = [f"parts.{part}.learning_rate=null" for part in ("vision", "projector", "language")]
    assert command("train", *settings(world, tmp_path / "run", *arguments, *rates, steps=9)) == 1
    assert "lower training.learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "gradient", "reason"),
    [
        (5.0, 1.0, None),
        (25.0, 1.0, "its loss of 25 is over 20, far worse than a guess"),
        (float("inf"), 1.0, "its loss is inf"),
        (5.0, float("nan"), "its gradients are not finite"),
    ],
)
def test_what_makes_a_step_bad(loss, gradient, reason):
    guard = BadSteps(3, 20.0, lambda indices, why: [])
    guard.on_step_begin(None, None, None)
    guard.saw(torch.tensor(loss / 2), torch.tensor([0]), last=False)
    guard.saw(torch.tensor(loss / 2), torch.tensor([1]), last=True)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), gradient)
    assert guard.refuses([weight]) == (reason is not None)
    assert guard.reason == reason


@pytest.mark.parametrize(("loss", "counted"), [(5.0, 0), (float("nan"), 1)])
def test_in_float16_gradients_may_overflow_and_the_loss_may_not(loss, counted):
    """DeepSpeed and torch skip such steps themselves, and nobody else is asked."""
    guard = BadSteps(3, 20.0, lambda indices, why: [])
    guard.on_step_begin(None, None, None)
    guard.saw(torch.tensor(loss), torch.tensor([0]), last=True)
    args, engine = SimpleNamespace(fp16=True), SimpleNamespace(step_was_skipped=True)
    guard.on_step_end(args, SimpleNamespace(global_step=1), None, optimizer=engine)
    assert guard.count == counted


def test_a_sample_that_was_changed_is_told_of_its_bad_step_too(tmp_path):
    (tmp_path / "skipped.jsonl").touch()
    told = Ledger(tmp_path / "skipped.jsonl", 9, 1.0)
    for stage in ("encode", "train", "train"):
        told.record(Entry("a", "data.json", stage, "a reason", changed=True))
    assert [entry["stage"] for entry in ledger(tmp_path)] == ["encode", "train"]


def test_a_process_refuses_what_another_does(monkeypatch):
    """Of gradients that only another's partition shows to be not finite."""
    monkeypatch.setattr(bad_steps, "any_rank", lambda mine: True)
    guard = BadSteps(3, 20.0, lambda indices, why: [])
    guard.on_step_begin(None, None, None)
    guard.saw(torch.tensor(5.0), torch.tensor([0]), last=True)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    assert guard.refuses([weight])


def test_the_average_is_the_runs_adapter(world, tmp_path):
    """B starts at zero, so that its average follows from the checkpoints alone."""
    output = tmp_path / "run"
    arguments = settings(world, output, "training.ema=0.5", "training.save_every=1", "training.keep=9")
    assert command("train", *arguments) == 0
    final = load_file(output / "adapter" / "adapter_model.safetensors")
    steps = [load_file(output / f"checkpoints/checkpoint-{n}/adapter/adapter_model.safetensors") for n in (1, 2, 3, 4)]
    average = {key: torch.zeros_like(tensor) for key, tensor in final.items() if ".lora_B" in key}
    assert average
    for number, weights in enumerate(steps, start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        average = {key: decay * value + (1 - decay) * weights[key] for key, value in average.items()}
    again = [*arguments[:-1], "training.keep=1"]
    for folder in ("checkpoints/checkpoint-3", "checkpoints/checkpoint-4", "adapter"):
        shutil.rmtree(output / folder)
    assert command("train", *again, "--resume") == 0  # from step 2
    resumed = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[key], final[key]) for key in final)
    for key, value in average.items():
        torch.testing.assert_close(final[key], value, msg=key)
        assert not torch.equal(final[key], steps[-1][key])
