"""The scripts outside the packages run: examples, benchmarks, and the recipe of the tiny base model."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys

import pytest
import torch

from mmdora.core.config import ModelConfig
from mmdora.models.loading import load_model
from tests.conftest import ROOT
from tests.processes import python


def script(*arguments: str) -> str:
    done = python(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses_of(printed: str) -> list[float]:
    return [float(line.split("loss")[1]) for line in printed.splitlines() if line.startswith("step")]


def test_the_training_loop_example_trains_saves_and_merges(tmp_path):
    printed = script("examples/own_loop.py", str(tmp_path))
    losses = losses_of(printed)
    assert losses[-1] < 0.1 * losses[0]
    assert float(printed.rsplit("difference", 1)[1]) < 1e-3
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("example", ["speech", "text_only"])
def test_the_examples_on_other_models_train_and_merge(example, monkeypatch, capsys):
    """Whisper and a causal language model; in this process, where the imports are paid already."""
    monkeypatch.setattr(sys, "argv", [example])
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = losses_of(printed)
    assert losses[-1] < 0.3 * losses[0]
    assert float(printed.rsplit("difference", 1)[1]) < 1e-4


def test_the_adapter_benchmark_measures_every_candidate(tmp_path):
    out = tmp_path / "result.json"
    script("benchmarks/adapter_step.py", "--hidden=64", "--tokens=16", "--rank=2", "--rounds=2", f"--out={out}")
    result = json.loads(out.read_text())
    assert {"frozen", "PEFT LoRA", "PEFT DoRA", "mmdora LoRA", "mmdora DoRA"} <= set(result["figures"])
    frozen = result["figures"]["frozen"]
    assert (frozen["step_over_frozen"], frozen["saved_over_frozen_mib"]) == (1.0, 0.0)
    saved = {name: row["saved_over_frozen_mib"] for name, row in result["figures"].items()}
    assert saved["mmdora DoRA"] < saved["PEFT DoRA"]


def test_the_generation_benchmark_measures_every_candidate(tmp_path):
    out = tmp_path / "result.json"
    script("benchmarks/generate.py", "--hidden=64", "--layers=1", "--tokens=2", "--rounds=1", f"--out={out}")
    for figures in json.loads(out.read_text())["figures"].values():
        ratios = figures["over the base model"]
        assert set(ratios) == {"base", "separate", "norms once", "merged_weights", "merge_adapters"}
        assert ratios["base"] == 1.0
        assert figures["merge_and_restore_seconds"] > 0


@pytest.mark.slow
def test_the_soak_counts_what_it_reads(tmp_path):
    out = tmp_path / "result.json"
    script("benchmarks/media_soak.py", "--videos=6", "--images=24", "--workers=2", f"--out={out}")
    for figures in json.loads(out.read_text())["figures"].values():
        assert (figures["images"], figures["videos"], figures["refused"]) == (24, 5, 1)
        assert figures["processes_left"] == figures["descriptors_left"] == 0


@pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord has no wheel for this machine")
def test_the_data_benchmark_measures_every_way(tmp_path):
    out = tmp_path / "result.json"
    script("benchmarks/data.py", "--rounds=1", "--images=16", f"--out={out}", "--clips", "320p, 8 of 300")
    figures = json.loads(out.read_text())["figures"]
    kept = {"limit, memory kept", "mmdora, memory not kept"}
    assert set(figures["images"]) == {"limit", "mmdora", "LLaVA's way"} | kept
    assert set(figures["conversations"]) == {"mmdora", "LLaVA's way"}
    ways = {"decord, apart", "decord, here", "pyav, apart", "pyav, here", "bare decord"}
    assert set(figures["frames, 320p, 8 of 300"]) == ways


def test_the_recipe_builds_a_base_model_with_its_card(world, tmp_path):
    overrides = [
        f"training.output={tmp_path}/run",
        f"model.language_model.path={tmp_path}/run/language_model",
        f"data.train=[{{path: {world}/retained_train.json, format: shapes, take: first:64}}]",
        f"evaluation.0.data={world}/retained_held_out.json",
        "evaluation.0.limit=60",
        "training.max_steps=2",
    ]
    out = tmp_path / "model"
    script("assets/tiny-llava/recipe.py", "configs/tiny_base.yaml", *overrides, f"--out={out}")
    card = (out / "README.md").read_text()
    assert "| place | " in card
    assert "@" not in card
    model, _ = load_model(ModelConfig(path=str(out), dtype="float32"))
    shipped, _ = load_model(ModelConfig(path="assets/tiny-llava", dtype="float32"))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in shipped.state_dict().items()}
    assert all(torch.isfinite(p).all() for p in model.parameters())
