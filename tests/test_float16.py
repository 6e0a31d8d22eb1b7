"""`model.dtype: float16`: every trained parameter has an fp32 master, on CPUs too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmdora
from mmdora.core.config import ModelConfig
from mmdora.core.config_files import load_config
from mmdora.models.loading import load_model
from mmdora.training.arguments import training_arguments
from mmdora.training.precision import to_training_precision
from tests.test_runs import command

EVERYTHING = "{vision: {method: full}, projector: {method: full}, language: {method: full}, lm_head: {method: full}}"
MIXED = "{vision: {method: full, last_blocks: 1}, projector: {method: full}, language: {method: dora, rank: 4}}"


def run(world: Path, output: Path, dtype: str, parts: str, *more: str) -> list[dict]:
    """Train three steps and return the lines of metrics.jsonl."""
    code = command(
        "train",
        "quickstart",
        f"data.train=[{{path: {world}/counting_held_out.json, format: shapes}}]",
        f"training.output={output}",
        f"parts={parts}",
        f"model.dtype={dtype}",
        "training.max_steps=3",
        "training.batch_size=4",
        "training.micro_batch_size=2",
        "training.warmup_ratio=0",
        "evaluation=[]",
        *more,
    )
    assert code == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in float16")
def test_float16_on_a_cpu_trains_as_float32(world, tmp_path):
    """The weights that it loads are rounded to float16; everything after that is the same."""
    losses = {d: [r["loss"] for r in run(world, tmp_path / d, d, EVERYTHING)] for d in ("float16", "float32")}
    assert losses["float16"] == pytest.approx(losses["float32"], rel=1e-3)
    half, full = (load_file(tmp_path / d / "adapter" / "adapter_model.safetensors") for d in ("float16", "float32"))
    assert {name: tensor.dtype for name, tensor in half.items()} == dict.fromkeys(full, torch.float32)
    for name, tensor in half.items():
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(tensor, full[name], atol=2e-3, rtol=2e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in float16")
def test_a_float16_run_resumes_exactly_and_merges_to_float16(world, tmp_path):
    output, merged = tmp_path / "run", tmp_path / "merged"
    settings = ["training.save_every=2", "model.new_tokens=[<a>,<b>]"]
    run(world, output, "float16", MIXED, *settings)
    file = output / "adapter" / "adapter_model.safetensors"
    before = load_file(file)
    shutil.rmtree(output / "checkpoints" / "checkpoint-3")
    run(world, output, "float16", MIXED, *settings, "--resume")
    after = load_file(file)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert command("merge", str(output), str(merged)) == 0
    weights = load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in float16")
@pytest.mark.parametrize("deepspeed", [None, "zero2"])
def test_training_arguments_of_float16_on_a_cpu(deepspeed, tmp_path, monkeypatch):
    """DeepSpeed's fp16 engine does not run on every CPU either."""
    monkeypatch.setattr("mmdora.training.arguments.prepare_deepspeed_config", lambda name: None)
    config = load_config("quickstart", ["model.dtype=float16", f"training.deepspeed={deepspeed or 'null'}"])
    arguments = training_arguments(config, tmp_path)
    assert not arguments.fp16
    assert not arguments.bf16


@pytest.mark.parametrize("autocast", [True, False])
def test_trained_parameters_are_in_fp32_and_frozen_ones_keep_their_dtype_under_autocast(autocast):
    model, _ = load_model(ModelConfig(path="assets/tiny-llava", dtype="float16"))
    mmdora.inject_adapters(model, {"projector": {"method": "full"}, "language": {"method": "dora"}})
    to_training_precision(model, autocast=autocast)
    dtypes = {trained: {p.dtype for p in model.parameters() if p.requires_grad is trained} for trained in (True, False)}
    assert dtypes == {True: {torch.float32}, False: {torch.float16 if autocast else torch.float32}}
