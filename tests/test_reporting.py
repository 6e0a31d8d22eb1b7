"""Metrics of a training run: they are correct, cover all processes, and reach the terminal, the files and W&B."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import mmdora
from data_pipelines.collator import Collator
from data_pipelines.dataset import read_source
from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from mmdora.core.config import SourceConfig
from mmdora.core.config_files import load_config
from mmdora.core.console import progress_bar
from mmdora.core.logs import logged
from mmdora.training.flops import flop_costs, peak_flops
from mmdora.training.metrics import BatchCounts, ThroughputMeter
from mmdora.training.progress import LiveDisplay, PlainDisplay, training_display
from mmdora.training.reporting import MetricsFile, curves
from tests.conftest import ROOT
from tests.test_evaluating import lines_of
from tests.test_runs import command, small
from tests.wandb_files import history, records

LINE = {
    "step": 12,
    "loss": 1.2345,
    "learning_rates": {"vision": 1e-3, "projector": 2e-3, "language": 1e-3},
    "tokens_per_second": 12345.6,
    "samples_per_second": 123.45,
    "frames_per_second": 456.7,
    "mfu": 0.4321,
    "memory_gib": 71.234,
    "seconds": 2.0,
    "seconds_waiting_for_data": 0.01,
}


def rows(encoder: Encoder, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Return two samples with an image and one without."""
    from PIL import Image as PILImage

    PILImage.new("RGB", (48, 48), "red").save(folder / "red.png")
    shown = Message("user", (Image(folder / "red.png"), Text("What colour is it?")))
    asked = Message("user", (Text("And what is the sky's?"),))
    said = [Message("assistant", (Text(text),)) for text in ("red", "a very deep red", "blue")]
    pairs = zip((shown, shown, asked), said, strict=True)
    return [encoder.encode(Sample(f"s{i}", pair, "test")) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("pack", [None, 10_000])
def test_padding_and_fillers_do_not_count(tiny, tmp_path, pack):
    _, processor = tiny
    encoder = Encoder(processor)
    samples, counts = rows(encoder, tmp_path), BatchCounts()
    fillers = encoder.fillers([Image, Video])
    collate = Collator(processor.tokenizer.pad_token_id, fillers=fillers, pack=pack)
    counts.add(collate(samples), fillers)  # a filler for videos
    counts.add(collate(samples[2:]), fillers)  # fillers for both
    lengths = [row["input_ids"].shape[1] for row in [*samples, samples[2]]]
    pixels = [row["pixel_values"] for row in samples[:2]]
    assert counts.tokens == sum(lengths)
    assert counts.squares == sum(length**2 for length in lengths)
    assert counts.supervised == sum(int((row["labels"] != -100).sum()) for row in [*samples, samples[2]])
    assert counts.samples == 4
    assert counts.frames == sum(p.shape[:-3].numel() for p in pixels)
    assert counts.pixels == sum(p.numel() for p in pixels)


def test_frames_of_patch_rows_are_counted_from_their_grid():
    ids = torch.tensor([[5, 6]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"pixel_values": torch.zeros(32, 1176), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    batch |= {"pixel_values_videos": torch.zeros(48, 1176), "video_grid_thw": torch.tensor([[3, 4, 4]])}
    counts = BatchCounts()
    counts.add(batch, {})
    assert counts.frames == 2 + 6  # two frames of a video share a patch


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
    ],
)
def test_peak_flops_by_device_name(name, tera):
    assert peak_flops(name) == tera * 1e12


def test_an_unknown_device_has_no_mfu(tiny):
    assert peak_flops("GeForce 256") is None
    meter = ThroughputMeter(torch.device("cpu"), flop_costs(tiny[0]))
    assert meter.read()["mfu"] is None


def test_mfu_is_the_flops_of_the_step_over_the_peak(tiny, tmp_path):
    model, processor = tiny
    meter = ThroughputMeter(torch.device("cpu"), flop_costs(model))
    meter.peak = 1e9
    meter.count([Collator(0)(rows(Encoder(processor), tmp_path))], {})
    counts = meter.total
    figures = meter.read()
    flops = meter.costs.flops(counts.tokens, counts.supervised, counts.squares, counts.pixels)
    assert figures["mfu"] == pytest.approx(flops / figures["seconds"] / 1e9, rel=0.05)


PARTS = {
    "dora everywhere": {"vision": {"method": "dora"}, "projector": {"method": "full"}, "language": {"method": "dora"}},
    "projector alone": {"projector": {"method": "full"}},
    "all in full": {"vision": {"method": "full"}, "projector": {"method": "full"}, "language": {"method": "full"}},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_the_flops_formula_is_close_to_what_pytorch_counts(tiny, tmp_path, parts):
    """PyTorch counts every matrix product of forward and backward; the formula omits norms and DoRA's own products."""
    model, processor = tiny
    mmdora.inject_adapters(model, parts)
    batch = Collator(processor.tokenizer.pad_token_id)(rows(Encoder(processor), tmp_path)[:1])
    counts = BatchCounts()
    counts.add(batch, {})
    model.train()
    with FlopCounterMode(display=False) as counter:  # its own loss, for which all tokens go through the head
        model(**batch).loss.backward()
    told = flop_costs(model).flops(counts.tokens, counts.tokens, counts.squares, counts.pixels)
    assert told == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_a_frozen_model_costs_a_third_of_a_trained_one(tiny):
    model, _ = tiny
    model.requires_grad_(False)
    frozen = flop_costs(model)
    model.requires_grad_(True)
    full = flop_costs(model)
    assert full.per_token == 3 * frozen.per_token
    assert full.per_supervised == 3 * frozen.per_supervised == 6 * model.lm_head.weight.numel()
    assert full.per_patch == 3 * frozen.per_patch
    assert full.per_pair == 3 * frozen.per_pair
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    projector = flop_costs(model)
    trained = sum(p.numel() for p in model.model.multi_modal_projector.parameters() if p.dim() == 2)
    assert projector.per_patch == frozen.per_patch  # nothing flows back into the vision encoder
    assert projector.per_token == 2 * frozen.per_token + 2 * trained


@pytest.mark.parametrize("width", [60, 80, 100])
def test_metrics_fit_the_terminal(width):
    out = io.StringIO()
    display = LiveDisplay(Console(file=out, width=width), 100)
    display.step(LINE)
    with display.bar("counting", 8) as advance:
        advance(3)
    display.close()
    shown = out.getvalue().splitlines()
    assert max(map(len, shown)) <= width
    text = " ".join(shown)
    for metric in ("12/100", "loss 1.234", "lr vision 1.0e-03, projector 2.0e-03, language 1.0e-03", "12,346 tokens/s"):
        assert metric in text
    for metric in ("123.5 samples/s", "456.7 frames/s", "MFU 43.2%", "71.2 GiB", "data wait 0.5%"):
        assert metric in text


def test_unknown_mfu_and_equal_rates_are_not_shown_apart():
    out = io.StringIO()
    display = LiveDisplay(Console(file=out, width=100), 100)
    display.step(LINE | {"mfu": None, "learning_rates": {"vision": 1e-3, "language": 1e-3}})
    display.close()
    assert "MFU" not in out.getvalue()
    assert "lr 1.0e-03 ·" in out.getvalue()


def test_without_a_terminal_each_step_that_is_due_is_one_plain_line(monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("mmdora.core.console.time", clock)
    out = io.StringIO()
    display = training_display(Console(file=out, width=40), steps=14, done=10)
    assert isinstance(display, PlainDisplay)
    line = LINE | {"learning_rates": {"vision": 1e-3, "language": 1e-3}}
    for step, now in ((11, 8), (12, 16), (13, 24), (14, 32)):  # 12 comes 8 seconds after the last line
        clock.now = now
        display.step(line | {"step": step})
    display.close()
    speeds = "loss 1.234  lr 1.0e-03  12,346 tokens/s  123.5 samples/s"
    assert out.getvalue().splitlines() == [
        f"step 11/14  {speeds}  eta 0:24",
        f"step 13/14  {speeds}  eta 0:08",
        f"step 14/14  {speeds}  in 0:32",
    ]


def test_without_a_terminal_a_progress_bar_is_plain_lines(monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("mmdora.core.console.time", clock)
    out = io.StringIO()
    with progress_bar(Console(file=out), "counting, before", 4000) as advance:
        for now in (5, 12, 15, 3700):
            clock.now = now
            advance(1000)
    assert out.getvalue().splitlines() == [
        "counting, before  0/4,000",
        "counting, before  2,000/4,000  eta 0:12",
        "counting, before  4,000/4,000  in 1:01:40",
    ]


def test_indexing_a_large_file_prints_plain_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data_pipelines.index.LARGE", 0)
    turns = [{"from": "human", "value": "What color?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": f"r{i}", "conversations": turns} for i in range(3)]))
    read_source(SourceConfig(path=f"{tmp_path}/rows.json"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("  ")[0] or line for line in lines] == ["indexing rows.json", "indexing rows.json  0/0 MB"]


def test_the_console_imports_neither_torch_nor_transformers():
    code = "import sys, mmdora.core.console; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_curves_have_flat_names():
    assert curves({"step": 3, "loss": 1.0, "mfu": None, "learning_rates": {"vision": 0.1}}) == {
        "loss": 1.0,
        "learning_rates/vision": 0.1,
    }
    assert curves({"step": 3, "eval": {"loss": 1.0, "counting": 50.0}}) == {"eval/loss": 1.0, "eval/counting": 50.0}


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.rewind(0)  # none yet
    for step in (1, 2, 3):
        file.line({"step": step, "loss": 1.0})
    with file.path.open("a") as torn:
        torn.write('{"step": 4, ')
    file.rewind(2)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_prints_warnings_and_every_rank_logs(rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    hub, own = logging.getLogger("transformers.models"), logging.getLogger("mmdora.training")
    handlers = list(logging.getLogger("transformers").handlers)
    with logged() as logs, warnings.catch_warnings():
        warnings.simplefilter("always")
        own.warning("before there is a run")
        logs.open(tmp_path)
        own.warning("our warning")
        own.info("a note")
        hub.warning("a warning of the hub")
        hub.error("an error of the hub")
        warnings.warn("something old", stacklevel=1)
        (written,) = (tmp_path / "logs").iterdir()
        assert written.name == f"rank-{rank}.log"
        texts = (
            "before there is a run",
            "our warning",
            "a note",
            "a warning of the hub",
            "an error of the hub",
            "something old",
        )
        assert [text in written.read_text() for text in texts] == [True] * 6
    shown = capsys.readouterr().err
    assert [text in shown for text in texts] == ([True, True, False, False, True, True] if rank == 0 else [False] * 6)
    assert logging.getLogger("transformers").handlers == handlers
    own.warning("after it")
    assert "after it" not in written.read_text()


@pytest.fixture(scope="module")
def reported(world, tmp_path_factory) -> Path:
    """A run with all reports, of two steps, resumed for two more."""
    pytest.importorskip("tensorboard")
    output = tmp_path_factory.mktemp("reports") / "run"
    held_out = f"path: {world}/counting_held_out.json, format: shapes, take: first:5"
    benchmark = f"name: counting, benchmark: vqa, data: {world}/counting_held_out.json, format: shapes"
    settings = [
        *small(world, output),
        f"data.validation=[{{{held_out}}}]",
        "training.evaluate_every=2",
        "training.lr_scheduler=constant",  # else a run cannot be made longer
        f"evaluation=[{{{benchmark}, limit: 4, during: true}}]",
        "training.report_to=[wandb, tensorboard]",
        "parts.language.learning_rate=3e-3",
    ]
    assert command("train", *settings, "training.max_steps=2") == 0
    assert command("train", *settings, "--resume") == 0
    return output


def test_a_step_has_every_documented_metric(reported):
    line = lines_of(reported)[0]
    assert set(line) == {
        *("step", "epoch", "loss", "grad_norm", "learning_rate", "learning_rates", "mfu", "memory_gib"),
        *("tokens_per_second", "samples_per_second", "frames_per_second", "seconds", "seconds_waiting_for_data"),
    }
    page = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in line if f"`{name}`" not in page] == []
    assert line["learning_rates"] == {"vision": 2e-3, "projector": 2e-3, "language": 3e-3}
    assert line["samples_per_second"] * line["seconds"] == pytest.approx(8, rel=0.02)
    assert 0.1 < line["memory_gib"] < 100
    assert 0 <= line["seconds_waiting_for_data"] <= line["seconds"]
    assert line["mfu"] is None


def test_wandb_gets_config_curves_predictions_and_the_adapter(reported):
    first, second = sorted((reported / "wandb").glob("offline-run-*"))
    found = [records(next(folder.glob("*.wandb"))) for folder in (first, second)]
    runs = [next(r.run for r in rs if r.WhichOneof("record_type") == "run") for rs in found]
    assert runs[0].run_id == runs[1].run_id == (reported / "wandb" / "id").read_text().strip()
    config = {update.key: json.loads(update.value_json) for update in runs[1].config.update if update.key != "_wandb"}
    assert config == load_config(str(reported / "config.yaml")).model_dump(mode="json", by_alias=True)
    rows = [row for rs in found for row in history(rs)]
    for line in lines_of(reported):
        flat = curves(line)
        assert any(row.get("step") == line["step"] and flat.items() <= row.items() for row in rows), line
    artifacts = [r.artifact for rs in found for r in rs if r.WhichOneof("record_type") == "artifact"]
    files = {a.type: {entry.path for entry in a.manifest.contents} for a in artifacts}
    assert files["adapter"] == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(path.startswith("media/images/") for path in files["run_table"]) >= 1
    (table, *_) = first.rglob("counting_*.table.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["step", "question", "answer", "prediction", "score", "image"]
    answers = (reported / "eval" / "during" / "step-2" / "counting" / "scores.jsonl").read_text().splitlines()
    assert table["data"][0][3] in {json.loads(answer)["response"] for answer in answers}


def test_tensorboard_gets_the_same_curves(reported):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reported / "tensorboard"))
    events.Reload()
    for line in lines_of(reported):
        for name, value in curves(line).items():
            values = {event.step: event.value for event in events.Scalars(name)}
            assert values[line["step"]] == pytest.approx(value, rel=1e-5), name


def test_the_loss_plot_shows_the_validation_loss(reported, monkeypatch):
    from matplotlib.axes import Axes

    from mmdora.analysis.plots import plot_loss

    drawn = {}
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.update({k["label"]: a}) or plot(self, *a, **k))
    plot_loss(reported / "metrics.jsonl", reported / "loss.png")
    lines = lines_of(reported)
    assert list(drawn["loss"][1]) == [line["loss"] for line in lines if "loss" in line]
    assert drawn["held out"] == ((2, 4), tuple(line["eval"]["loss"] for line in lines if "eval" in line))


def test_the_loss_plot_of_a_run_without_a_finite_loss(tmp_path):
    from mmdora.analysis.plots import plot_loss

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_report_that_is_not_installed_is_an_error_before_training(name, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert command("train", *small(world, tmp_path / "run"), f"training.report_to={name}") == 2
    printed, error = capsys.readouterr()
    assert f"training.report_to: {name} is not installed; pip install" in error
    assert not (tmp_path / "run").exists()
    assert "adapters" not in printed
