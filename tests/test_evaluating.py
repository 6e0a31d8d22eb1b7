"""Evaluation during training: exact, without an effect on training, the same for any number of processes."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import TrainerControl

from data_pipelines.dataset import read_source
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import SampleError
from mmdora.adapters.save_load import load_adapter
from mmdora.apps import during_training
from mmdora.apps.load_target import load_target
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from mmdora.core.resuming import check_resumable
from mmdora.training.callbacks import MetricsCallback
from mmdora.training.reporting import MetricsFile, curves
from mmdora.training.signals import StopOnSignal
from mmdora.training.validation import evaluating, rank_batches, validation_loss
from tests.grid import run_in_two_processes
from tests.test_runs import command, small

# Results of a run under ZeRO-3, and how their adapter was computed.
RECEIPTS = {"before": None, "during/step-4": "separate: ZeRO-3 partitions the weights", ".": "merged"}
PLUGIN = """
import logging, warnings
warnings.warn("a warning of all processes")
logging.getLogger("transformers.models").warning("a note of all processes")
"""


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Nine samples, for batches of 4: four without an image, four with one (one file is missing), one without."""
    folder = tmp_path_factory.mktemp("held_out")
    rows = []
    for i in range(9):
        answer = ("red", "a blue square", "two", "left of it")[i % 4]
        turns = [{"from": "human", "value": f"What is number {i}?"}, {"from": "gpt", "value": answer}]
        row = {"id": f"row-{i}", "conversations": turns}
        if 4 <= i < 8:
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            row["image"] = f"{i}.png"
            if i != 6:
                Image.new("RGB", (48, 48), (40 * i % 256, 20 * i, 255 - 20 * i)).save(folder / f"{i}.png")
        rows.append(row)
    (folder / "held_out.json").write_text(json.dumps(rows))
    return folder / "held_out.json"


def evaluated(world: Path, output: Path, held_out: Path) -> list[str]:
    """The arguments of a small run that is evaluated after its second and its fourth step."""
    counting = f"name: counting, benchmark: vqa, data: {world}/counting_held_out.json, format: shapes"
    return [
        *small(world, output),
        f"data.validation=[{held_out}]",
        "data.max_skipped=0.1",
        "training.evaluate_every=2",
        "training.best=loss",
        "training.ema=0.5",
        f"evaluation=[{{{counting}, limit: 5, batch_size: 2, during: true}}]",
    ]


@pytest.fixture(scope="module")
def run(world, held_out, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "evaluated"
    assert command("train", *evaluated(world, output, held_out)) == 0
    return output


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter_of(run: Path, folder: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(run / folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_every_held_out_sample_is_in_one_batch_of_one_process():
    for samples, size, world in [(9, 4, 2), (8, 4, 2), (1, 4, 3), (7, 1, 2), (5, 8, 1)]:
        shares = [rank_batches(samples, size, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for batch in share for i in batch) == list(range(samples))


def test_the_loss_is_the_mean_over_all_supervised_tokens(run, held_out):
    """It equals the mean computed sample by sample. The sample without its image is in skipped.jsonl."""
    loaded = load_target(str(run))
    encoder, total, tokens = Encoder(loaded.processor, loaded.video), 0.0, 0
    source = read_source(load_config("quickstart", [f"data.train=[{held_out}]"]).data.train[0])
    for sample in source:
        try:
            row = encoder.encode(sample)
        except SampleError:
            continue
        count = int((row["labels"] != IGNORED).sum())
        with torch.no_grad():
            total, tokens = total + float(loaded.model(**row).loss) * count, tokens + count
    (second, fourth) = [line for line in lines_of(run) if "eval" in line]
    assert (second["step"], fourth["step"]) == (2, 4)
    assert fourth["eval"]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert second["eval"]["loss"] != fourth["eval"]["loss"]
    (skipped,) = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert skipped["id"] == "row-6"
    assert skipped["source"] == f"{held_out} (data.validation.0)"


def test_benchmarks_are_scored_during_training(run):
    for line in (line for line in lines_of(run) if "eval" in line):
        folder = run / "eval" / "during" / f"step-{line['step']}" / "counting"
        report = json.loads((folder / "report.json").read_text())
        assert report["n"] == 5
        assert report["scores"]["official"]["value"] == line["eval"]["counting"]
        assert report["receipt"]["adapter"] == f"step {line['step']}"
        assert report["receipt"]["adapter_weights"] == "merged"
    # The last evaluation used the model that was saved: it gives the same answers when it is loaded.
    answers = [(run / "eval" / where / "scores.jsonl").read_text() for where in ("during/step-4/counting", "counting")]
    assert answers[0] == answers[1]
    assert "during" not in {p.name for p in (run / "eval" / "counting").iterdir()}


def test_the_best_adapter_is_kept(run, tiny):
    losses = {line["step"]: line["eval"]["loss"] for line in lines_of(run) if "eval" in line}
    best = json.loads((run / "best" / "best.json").read_text())
    assert best == {"step": min(losses, key=losses.get), "metric": "loss", "value": min(losses.values())}
    load_adapter(tiny[0], run / "best" / "adapter")
    assert same(adapter_of(run, "best/adapter"), adapter_of(run)) == (best["step"] == 4)


def test_evaluation_does_not_change_training(run, world, tmp_path):
    assert command("train", *small(world, tmp_path / "alone"), "evaluation=[]", "training.ema=0.5") == 0
    assert same(adapter_of(tmp_path / "alone"), adapter_of(run))
    losses = [[line["loss"] for line in lines_of(r) if "loss" in line] for r in (run, tmp_path / "alone")]
    assert losses[0] == losses[1]


def test_a_runs_own_config_gives_the_same_adapter(run, tmp_path):
    assert command("train", str(run / "config.yaml"), f"training.output={tmp_path / 'again'}") == 0
    assert same(adapter_of(tmp_path / "again"), adapter_of(run))
    assert same(adapter_of(tmp_path / "again", "best/adapter"), adapter_of(run, "best/adapter"))
    losses = [[line["eval"]["loss"] for line in lines_of(r) if "eval" in line] for r in (run, tmp_path / "again")]
    assert losses[0] == losses[1]


def test_a_resumed_run_keeps_its_best_so_far(world, held_out, tmp_path, monkeypatch):
    """The loss rises after the second step. Resumed from there, the run still knows its best adapter."""
    losses = {2: 1.0, 4: 2.0}
    monkeypatch.setattr(during_training, "validation_loss", lambda trainer, *_: (losses[trainer.state.global_step], 9))
    output = tmp_path / "run"
    settings = [*evaluated(world, output, held_out), "evaluation=[]"]
    assert command("train", *settings) == 0
    lines, best = lines_of(output), adapter_of(output, "best/adapter")
    assert json.loads((output / "best" / "best.json").read_text()) == {"step": 2, "metric": "loss", "value": 1.0}
    assert not same(best, adapter_of(output))
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(output / name)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a killed process leaves it
    assert command("train", *settings, "--resume") == 0
    assert json.loads((output / "best" / "best.json").read_text())["step"] == 2
    assert same(best, adapter_of(output, "best/adapter"))
    without_times = [
        [(line["step"], line.get("loss"), line.get("eval", {}).get("loss")) for line in metrics]
        for metrics in (lines, lines_of(output))
    ]
    assert without_times[0] == without_times[1]  # steps after the checkpoint are listed once


@pytest.mark.parametrize(
    ("best", "changed"), [("loss", "data.validation.0.take"), ("counting", "evaluation.0.limit"), ("loss", None)]
)
def test_resuming_with_other_held_out_data_is_an_error_if_it_selects_the_best(world, held_out, best, changed):
    arguments = [*evaluated(world, Path("run"), held_out), f"training.best={best}"]
    begun = load_config(arguments[0], arguments[1:])
    if changed is None:  # this entry does not select the best adapter
        return check_resumable(begun, load_config(arguments[0], [*arguments[1:], "evaluation.0.limit=3"]), Path("run"))
    value = "first:3" if "take" in changed else "3"
    with pytest.raises(UserError, match=changed):
        check_resumable(begun, load_config(arguments[0], [*arguments[1:], f"{changed}={value}"]), Path("run"))
    return None


def test_the_highest_score_of_a_benchmark_is_the_best(world, held_out, tmp_path, monkeypatch):
    scores = {1: 50.0, 2: 75.0, 3: 75.0, 4: 25.0}
    evaluate = during_training.evaluate

    def scripted(model, encoder, entry, questions, folder, *args, **kwargs):
        report = evaluate(model, encoder, entry, questions, folder, *args, **kwargs)
        report["scores"]["official"]["value"] = scores[int(folder.parent.name.removeprefix("step-"))]
        return report

    monkeypatch.setattr(during_training, "evaluate", scripted)
    monkeypatch.setattr(during_training, "validation_loss", lambda *_: (math.nan, 9))
    settings = [*evaluated(world, tmp_path / "run", held_out), "training.evaluate_every=1", "evaluation.0.limit=1"]
    assert command("train", *settings, "training.best=counting") == 0
    best = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert best == {"step": 2, "metric": "counting", "value": 75.0}


def test_a_full_part_is_trained_in_fp32_beside_a_half_precision_base(world, tmp_path):
    """Updates too small for bfloat16's eight bits add up. The model can be evaluated meanwhile."""
    output = tmp_path / "run"
    rates = [f"parts.{part}.learning_rate=1e-6" for part in ("vision", "projector", "language")]
    settings = [*small(world, output), "model.dtype=bfloat16", "training.evaluate_every=4", "evaluation.0.during=true"]
    assert command("train", *settings, "training.lr_scheduler=constant", *rates) == 0
    projector = {k: v for k, v in adapter_of(output).items() if "projector" in k and k.endswith("weight")}
    assert projector
    for key, weight in projector.items():
        assert weight.dtype == torch.float32, key
        assert (weight != weight.bfloat16()).float().mean() > 0.5, key


class Interrupted(Dataset):
    """Its worker gets SIGTERM, like every process of a process group."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"input_ids": torch.zeros(1, 3, dtype=torch.long), "labels": torch.zeros(1, 3, dtype=torch.long)}


def test_sigterm_to_a_worker_does_not_interrupt_the_evaluation():
    args = SimpleNamespace(
        per_device_train_batch_size=1,
        dataloader_num_workers=1,
        dataloader_pin_memory=False,
        device=torch.device("cpu"),
    )
    trainer = SimpleNamespace(
        args=args,
        model=lambda **_: SimpleNamespace(loss=1.5),
        model_accepts_loss_kwargs=False,
        _prepare_inputs=lambda batch: batch,
        compute_loss_context_manager=nullcontext,
        chunked_loss=nullcontext(),
    )
    assert validation_loss(trainer, Interrupted(), lambda rows: rows[0]) == (1.5, 4)


def test_sigterm_in_an_evaluation_ends_the_run_after_it():
    stop, control = StopOnSignal("save"), TrainerControl()
    stop.received = signal.SIGTERM
    stop.on_evaluate(SimpleNamespace(device="cpu"), None, control)
    assert control.should_training_stop
    assert control.should_save


def test_figures_that_are_not_finite_are_null(tmp_path):
    log = SimpleNamespace(reports=MetricsFile(tmp_path / "metrics.jsonl"))
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    MetricsCallback.on_evaluate(log, None, state, None, {"loss": math.nan, "counting": 50.0})
    (line,) = lines_of(tmp_path)
    assert line == {"step": 3, "eval": {"loss": None, "counting": 50.0}}
    assert curves(line) == {"eval/counting": 50.0}


def test_evaluating_restores_modes_and_random_states(tiny):
    model, _ = tiny
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with evaluating(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        drawn = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert drawn == (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002
    assert before[0] != random.getstate()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.evaluate_every=2"], r"has nothing to evaluate: give 'data.validation', or an 'evaluation' entry"),
        (["data.validation=[x.json]"], r"'data.validation' needs 'training.evaluate_every'"),
        (["evaluation.0.during=true"], r"'evaluation.\*.during' needs 'training.evaluate_every'"),
        (["training.best=loss"], r"'training.best' needs 'training.evaluate_every'"),
        (
            ["training.evaluate_every=2", "evaluation.0.during=true", "training.best=loss"],
            r"'training.best' 'loss' is not evaluated during training. Available: counting",
        ),
        (
            ["training.evaluate_every=2", "evaluation.0.during=true", "training.best=countin"],
            r"Did you mean 'counting'\?",
        ),
        (
            ["training.evaluate_every=2", "evaluation.0={name: loss, benchmark: vqa, data: x, during: true}"],
            r"with 'during' cannot be named 'loss'",
        ),
        (
            ["training.evaluate_every=2", "data.validation=[{path: x.json, weight: 2}]"],
            r"'weight' is for training data",
        ),
    ],
)
def test_evaluation_settings_that_contradict_are_errors(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", overrides)


def test_missing_held_out_files_are_reported_before_anything_is_loaded(world, tmp_path, capsys):
    settings = [*small(world, tmp_path / "run"), "data.validation=[{path: gone.json, media: nowhere, format: lava}]"]
    assert command("train", *settings, "training.evaluate_every=2") == 2
    error = capsys.readouterr().err
    assert "data.validation.0.path: no such file 'gone.json'" in error
    assert "data.validation.0.media: no such folder 'nowhere'" in error
    assert "data.validation.0.format" in error


def test_two_processes_under_zero3_evaluate_like_one(run, world, held_out, tmp_path):
    """Batches with and without images at once, a process without a batch, odd numbers of questions: the losses and
    answers are the same. Each process has its log."""
    (tmp_path / "a_plugin.py").write_text(PLUGIN)
    output = tmp_path / "two"
    settings = [*evaluated(world, output, held_out), "training.deepspeed=zero3", "plugins=[a_plugin]"]
    settings += ["evaluation.0.before=true", "evaluation.0.batch_size=1"]
    printed = run_in_two_processes(settings, output, plugins=tmp_path)
    ours, theirs = lines_of(output), lines_of(run)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 2, 3, 4, 4]
    for actual, expected in zip(ours, theirs, strict=True):
        if "eval" in actual:
            assert actual["eval"]["loss"] == pytest.approx(expected["eval"]["loss"], rel=1e-4)
            assert actual["eval"]["counting"] == expected["eval"]["counting"]
            continue
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert actual["learning_rates"] == pytest.approx(expected["learning_rates"])
        for figure in ("tokens", "samples", "frames"):  # of all processes
            totals = [line[f"{figure}_per_second"] * line["seconds"] for line in (actual, expected)]
            assert totals[0] == pytest.approx(totals[1], rel=0.02)
    answers = [
        [json.loads(line)["response"] for line in (r / "eval/during/step-4/counting/scores.jsonl").open()]
        for r in (output, run)
    ]
    assert answers[0] == answers[1]
    receipts = [json.loads((output / f"eval/{f}/counting/report.json").read_text())["receipt"] for f in RECEIPTS]
    assert [receipt.get("adapter_weights") for receipt in receipts] == list(RECEIPTS.values())
    assert json.loads((output / "best" / "best.json").read_text())["step"] == 4
    assert printed.count("UserWarning: a warning of all processes") == 1
    assert "a note of all processes" not in printed
    for rank in (0, 1):
        log = (output / "logs" / f"rank-{rank}.log").read_text()
        assert f"process {rank} of 2" in log
        assert "a warning of all processes" in log
        assert "a note of all processes" in log
