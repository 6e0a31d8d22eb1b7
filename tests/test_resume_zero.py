"""Checkpoints under DeepSpeed with two real processes: exact at each stage, and from any stage to any other."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdora.core.atomic import damage
from tests.grid import deepspeed_file, launch, run_in_two_processes, torchrun
from tests.test_runs import command, small

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")


def settings(world: Path, output: Path, *more: str) -> list[str]:
    return [*small(world, output), "training.keep=9", "evaluation=[]", *more]


def copy_until(step: int, run: Path, copy: Path) -> None:
    """Copy a run as if it had been killed after a step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter")
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


def check_close(run: Path, reference: Path, tolerance: float) -> None:
    """Compare losses, and the distance between adapters with the distance that training covered in the last 2 steps."""
    ours, theirs, start = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run / "adapter", reference / "adapter", reference / "checkpoints" / "checkpoint-2" / "adapter")
    )
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    difference = sum((ours[name].double() - tensor).square().sum() for name, tensor in theirs.items()).sqrt()
    covered = sum((start[name].double() - tensor).square().sum() for name, tensor in theirs.items()).sqrt()
    assert difference <= tolerance * covered, (difference / covered).item()
    losses = [[json.loads(line)["loss"] for line in (r / "metrics.jsonl").open()] for r in (run, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=max(tolerance, 1e-6))


def different_tensors(run: Path, reference: Path) -> list[str]:
    """Return the names of the tensors in the last checkpoint that are not bit-identical."""
    different = []
    for path in (reference / "checkpoints" / "checkpoint-4").rglob("*.safetensors"):
        theirs = load_file(path)
        ours = load_file(run / path.relative_to(reference))
        assert ours.keys() == theirs.keys()
        different += [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    return different


def test_a_run_moves_between_stages_and_numbers_of_processes(world, tmp_path, caplog):
    """ZeRO-2 with 2 processes → one process without DeepSpeed → ZeRO-3 with 2, each resumed within the run."""
    whole, alone, again = tmp_path / "whole", tmp_path / "alone", tmp_path / "again"
    run_in_two_processes(settings(world, whole, "training.deepspeed=zero2"), whole)
    copy_until(2, whole, alone)
    assert command("train", *settings(world, alone, "training.save_every=1"), "--resume") == 0
    assert "was written by 2 processes and is resumed by 1" in caplog.text
    check_close(alone, whole, 1e-2)
    copy_until(3, alone, again)
    run_in_two_processes([*settings(world, again, "training.deepspeed=zero3"), "--resume"], again)
    check_close(again, whole, 1e-2)


GRID = [(0, 0, "float32"), (0, 0, "bfloat16"), (1, 0, "float32"), (1, 0, "bfloat16"), (2, 0, "float32")]
GRID += [(2, 0, "bfloat16"), (2, 1, "float32"), (3, 0, "float32"), (3, 0, "bfloat16"), (3, 1, "float32")]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload", "dtype"), GRID)
def test_resuming_at_the_same_stage_is_exact(world, tmp_path, stage, offload, dtype):
    """With the same number of processes, weights, master weights and moments end bit-identical."""
    more = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    engine = f"training.deepspeed={deepspeed_file(tmp_path, 'engine', stage, **more)}"
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = [engine, f"model.dtype={dtype}", "parts.language.dropout=0.1"]
    run_in_two_processes(settings(world, whole, *options), whole)
    copy_until(2, whole, again)
    run_in_two_processes([*settings(world, again, *options), "--resume"], again)
    assert different_tensors(again, whole) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "cause"), [("TERM", "SIGTERM"), ("INT", "Ctrl-C")])
def test_a_signal_to_one_process_stops_all_after_the_same_step(world, tmp_path, monkeypatch, number, cause):
    monkeypatch.setenv("END", f"forward 5 {number}")
    run = tmp_path / "run"
    arguments = settings(world, run, "training.deepspeed=zero2", "training.max_steps=8", "plugins=[tests.killer]")
    done = launch([*torchrun(), "train.py", *arguments], tmp_path, limit=500)
    assert done.returncode == 1
    assert done.stderr.count(f"stopped by {cause} after step 5; checkpoint-5 is saved") == 1
    assert damage(run / "checkpoints" / "checkpoint-5") is None
    assert not (run / "checkpoints" / "checkpoint-6").exists()


@pytest.mark.slow
def test_master_weights_are_not_rounded_between_precisions(world, tmp_path):
    """bf16 with fp32 masters (ZeRO-2, 2 processes) → fp32 (one process) → bf16 (ZeRO-3, 2 processes).

    Master weights and moments arrive as they were written, so that the following steps are as long as without resuming.
    """
    whole, alone, again = tmp_path / "whole", tmp_path / "alone", tmp_path / "again"
    half = "model.dtype=bfloat16"
    run_in_two_processes(settings(world, whole, "training.deepspeed=zero2", half), whole)
    copy_until(2, whole, alone)
    assert command("train", *settings(world, alone, half, "training.save_every=1"), "--resume") == 0
    check_close(alone, whole, 0.3)
    copy_until(3, alone, again)
    run_in_two_processes([*settings(world, again, "training.deepspeed=zero3", half), "--resume"], again)
    check_close(again, whole, 0.3)
