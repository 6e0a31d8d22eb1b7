"""Complete runs through the command line: train, resume, evaluate, merge, chat; and the errors of invalid input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdora.apps.load_target import load_target
from mmdora.cli import main
from mmdora.core.run_directory import RunDir
from tests.conftest import ROOT


def command(*arguments: str) -> int:
    """Run the command line in this process; returns its exit code."""
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def small(world: Path, output: Path, steps: int = 4) -> list[str]:
    """Return the arguments of the quickstart with few steps and questions."""
    motion, counting = (f"path: {world}/{task}_held_out.json, format: shapes" for task in ("motion", "counting"))
    benchmark = f"name: counting, benchmark: vqa, data: {world}/counting_held_out.json, format: shapes"
    return [
        "quickstart",
        f"data.train=[{{{motion}}}, {{{counting}}}]",
        f"training.output={output}",
        f"training.max_steps={steps}",
        "training.batch_size=8",
        "training.micro_batch_size=4",
        "training.save_every=2",
        "training.warmup_ratio=0",
        "data.num_workers=0",
        f"evaluation=[{{{benchmark}, limit: 6, before: true}}]",
    ]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "small"
    assert command("train", *small(world, output)) == 0
    return output


def test_a_run_directory_holds_the_documented_files(trained):
    for name in ("config.yaml", "metrics.jsonl", "skipped.jsonl", "report.html", "loss.png", "checkpoints"):
        assert (trained / name).exists(), name
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (trained / "adapter").iterdir()}
    for folder in ("eval/counting", "eval/before/counting"):
        assert (trained / folder / "responses.jsonl").exists()
        assert (trained / folder / "scores.jsonl").exists()
        report = json.loads((trained / folder / "report.json").read_text())
        assert {"name", "benchmark", "n", "scores", "unparsed_rate", "receipt"} <= set(report)
        assert report["n"] == 6
        assert set(report["scores"]) == {"official", "strict"}
        assert set(report["scores"]["official"]) == {"value", "low", "high"}
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    page = (trained / "report.html").read_text()
    assert "How many" in page
    assert "data:image/jpeg;base64," in page


def test_checkpoints_hold_no_frozen_weights(trained):
    checkpoint = RunDir(trained).checkpoint()
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    size = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    adapter = (trained / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 3.5 * adapter  # the adapter and AdamW's two moments


def test_resumed_equals_uninterrupted(world, trained, tmp_path):
    """A run that is stopped after two of four steps and resumed ends with the same adapter, bit for bit."""
    output = tmp_path / "resumed"
    assert command("train", *small(world, output)) == 0
    for name in ("adapter", "checkpoints/checkpoint-4"):
        import shutil

        shutil.rmtree(output / name)
    assert command("train", *small(world, output), "--resume") == 0
    first = load_file(trained / "adapter" / "adapter_model.safetensors")
    again = load_file(output / "adapter" / "adapter_model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_an_existing_run_is_not_overwritten(world, trained, capsys):
    assert command("train", *small(world, trained)) == 2
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--overwrite" in message


def test_overwrite_moves_the_old_run_aside(world, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text("old")
    assert command("train", *small(world, output, steps=1), "evaluation=[]", "--overwrite") == 0
    aside = [p for p in tmp_path.iterdir() if p != output]
    assert len(aside) == 1
    assert (aside[0] / "config.yaml").read_text() == "old"


def test_eval_of_a_run(trained, tmp_path, capsys):
    responses = trained / "eval" / "counting" / "responses.jsonl"
    written = responses.stat().st_mtime_ns
    assert command("eval", str(trained)) == 0  # finished: the report is read, no question is answered
    assert "counting" in capsys.readouterr().out
    assert command("eval", str(trained), "--limit", "3") == 2
    assert "a finished result with other limit; --overwrite replaces it" in capsys.readouterr().err
    assert responses.stat().st_mtime_ns == written
    assert command("eval", str(trained), "--out", str(tmp_path)) == 0
    assert command("eval", str(trained), "--limit", "3", "--out", str(tmp_path), "--overwrite") == 0
    assert json.loads((tmp_path / "counting" / "report.json").read_text())["n"] == 3
    assert command("eval", str(trained), "--out", str(tmp_path), "--overwrite") == 0
    again = json.loads((tmp_path / "counting" / "report.json").read_text())
    first = json.loads((trained / "eval" / "counting" / "report.json").read_text())
    assert again["scores"] == first["scores"]
    assert again["receipt"]["weights"] == first["receipt"]["weights"]
    assert command("eval", str(trained), "--only", "countin", "--out", str(tmp_path / "x")) == 2
    assert "Did you mean 'counting'" in capsys.readouterr().err
    assert command("eval", "assets/tiny-llava") == 2
    assert "--benchmark NAME --data DIR --out DIR" in capsys.readouterr().err


def test_merge_as_a_plain_lora_reports_the_error(trained, tmp_path, capsys):
    out = tmp_path / "lora"
    assert command("merge", str(trained), str(out), "--lora-rank", "4") == 0
    assert "relative error of the weight change (Frobenius norm): " in capsys.readouterr().out
    assert not json.loads((out / "adapter_config.json").read_text())["use_dora"]


def test_merge_loads_in_plain_transformers(trained, tmp_path, capsys):
    out = tmp_path / "merged"
    assert command("merge", str(trained), str(out)) == 0
    printed = capsys.readouterr().out
    assert "largest logit difference" in printed
    assert float(printed.split("difference")[1].split()[0]) < 1e-3
    # In a process that does not import mmdora.
    code = f"""
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(out)!r})
AutoProcessor.from_pretrained({str(out)!r})
assert "mmdora" not in sys.modules
print(type(model).__name__, type(model.model.vision_tower).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["LlavaOnevisionForConditionalGeneration", "CLIPVisionModel"]
    assert command("merge", str(trained), str(out)) == 2


def test_chat_answers_from_a_pipe(world, trained, capsys, monkeypatch):
    image = next((world / "counting_held_out").glob("*.png"))
    monkeypatch.setattr("sys.stdin", io.StringIO("What shape is the red thing?\nAnd what color is it?\n"))
    assert command("chat", str(trained), "--image", str(image), "--max-new-tokens", "4") == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
    assert command("chat", str(trained), "--image", "gone.png") == 2
    assert "gone.png: no such file" in capsys.readouterr().err


def test_analyze_and_list(trained, capsys):
    assert command("analyze", str(trained)) == 0
    assert "correlation of ΔD and ΔM over 39 layers" in capsys.readouterr().out
    for kind, name in [
        ("adapters", "dora"),
        ("vision-encoders", "open_clip"),
        ("architectures", "llava_onevision"),
        ("formats", "llava"),
        ("video-readers", "decord"),
        ("benchmarks", "nlvr"),
        ("configs", "quickstart"),
    ]:
        assert command("list", kind) == 0
        assert name in capsys.readouterr().out
    assert command("list", "adaptors") == 2
    assert "Did you mean 'adapters'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["model.path=assets/tiny-lava"], ["model.path", "assets/tiny-lava"]),
        (["data.train=[gone.json]"], ["data.train.0.path: no such file 'gone.json'"]),
        (["data.train.0.media=nowhere"], ["data.train.0.media: no such folder 'nowhere'"]),
        (["data.train.0.format=lava"], ["data.train.0.format", "Did you mean 'llava'"]),
        (["parts.vision.method=dorra"], ["parts.vision.method", "Did you mean 'dora'"]),
        (["parts.visoin={method: dora}"], ["parts.visoin", "Did you mean 'vision'"]),
        (["evaluation.0.media=nowhere"], ["evaluation.0.media: no such folder 'nowhere'"]),
        (["evaluation.0.format=lava"], ["evaluation.0.format", "Did you mean 'llava'"]),
        (["evaluation.0.benchmark=vqq"], ["evaluation.0.benchmark", "Did you mean 'vqa'"]),
        (["data.video.reader=decrod"], ["data.video.reader", "Did you mean 'decord'"]),
        (["training.deepspeed=zero9"], ["training.deepspeed: no such config 'zero9'", "zero1, zero2, zero2_offload"]),
        (["training.batch_size=x", "model.dtyp=y"], ["training.batch_size", "model.dtyp: unknown key"]),
        (["plugins=[no_such_plugin]"], ["plugins: cannot import 'no_such_plugin'"]),
    ],
)
def test_invalid_input_is_one_clear_error_and_exit_code_2(world, tmp_path, capsys, overrides, messages):
    assert command("train", *small(world, tmp_path / "run"), *overrides) == 2
    printed, error = capsys.readouterr()
    assert "before" not in printed  # reported before anything is evaluated
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for message in messages:
        assert message in error


def test_a_full_disk_is_one_clear_error(world, tmp_path, capsys, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert command("train", *small(world, tmp_path / "run"), "evaluation=[]") == 2
    assert "no disk space" in capsys.readouterr().err


def test_an_error_of_another_rank_is_reported_after_rank_0(capsys, monkeypatch):
    waits: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waits.append)
    assert command("train", "nowhere") == 2
    assert waits == [3.0]
    assert capsys.readouterr().err.startswith("error (rank 1): no config at 'nowhere'")


def test_help_is_quick_to_import():
    """The command line imports no heavy library before a command runs."""
    code = "import sys, mmdora.cli; print(sorted({'torch', 'pydantic', 'rich', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wandb_records_offline(world, tmp_path):
    output = tmp_path / "run"
    assert command("train", *small(world, output, steps=1), "evaluation=[]", "training.report_to=wandb") == 0
    assert list((output / "wandb").glob("offline-run-*"))


def test_real_media(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "real"
    arguments = [
        "quickstart",
        f"data.train=[{shared}/media/instruct.json]",
        "data.max_skipped=0.2",
        f"training.output={output}",
        "training.max_steps=null",
        "training.epochs=4",
        "training.batch_size=4",
        "training.micro_batch_size=4",
        "evaluation=[]",
    ]
    assert command("train", *arguments) == 0
    assert "1 of 7 samples skipped" in capsys.readouterr().out
    (entry,) = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert entry["id"] == "corrupted-1"
    assert "corrupted.mp4" in entry["file"]


def test_nlvr(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "nlvr"
    arguments = [
        "nlvr",
        f"data.train.0.path={shared}/nlvr/dev/dev.json",
        f"evaluation.0.data={shared}/nlvr/dev",
        f"training.output={output}",
        "training.max_steps=2",
        "evaluation.0.limit=20",
        "evaluation.0.before=false",
    ]
    assert command("train", *arguments) == 0
    report = json.loads((output / "eval" / "nlvr" / "report.json").read_text())
    assert report["n"] == 20
    assert report["majority_baseline"] >= 50


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_on_a_quantized_language_model(bits, world, tmp_path, capsys):
    bnb = pytest.importorskip("bitsandbytes")
    run, out = tmp_path / "run", tmp_path / "merged"
    assert command("train", *small(world, run, steps=2), f"model.quantization={bits}") == 0
    model = load_target(str(run)).model
    kind = bnb.nn.Linear4bit if bits == "4bit" else bnb.nn.Linear8bitLt
    assert sum(isinstance(m, kind) for m in model.model.language_model.modules()) == 21
    assert not any(isinstance(m, kind) for m in model.model.vision_tower.modules())
    assert model.lm_head.weight.is_floating_point()
    capsys.readouterr()
    assert command("merge", str(run), str(out)) == 0
    assert "without mmdora" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_what_cannot_be_quantized_is_said(world, tmp_path, capsys):
    settings = [*small(world, tmp_path / "run"), "model.quantization=4bit"]
    assert command("train", *settings, "training.deepspeed=zero3") == 2
    assert "ZeRO-3 cannot partition quantized weights" in capsys.readouterr().err
    full = "parts={language: {method: full}}"
    assert command("train", *[s.replace("/run", "/other") for s in settings], full) == 2
    assert "is quantized and cannot be trained in full" in capsys.readouterr().err
