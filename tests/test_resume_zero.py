"""Checkpoints under DeepSpeed, with two real processes: exact at each stage, and from any stage to any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdora.core.atomic import damage
from tests.conftest import ROOT
from tests.test_runs import command, small
from tests.zero_worker import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")


def launch(tmp_path: Path, runs: list[list[str]], end: str = "") -> str:
    """Commands one after another, each in the same two processes; returns what they print. `end`: see killer.py."""
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "tests/zero_worker.py", str(tmp_path / "runs.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "END": end},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == int(bool(end)), done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def stage(tmp_path: Path, number: int, offload: bool = False) -> str:
    """A DeepSpeed JSON: the shipped one; stage 0 has none."""
    path = tmp_path / f"zero{number}{'_offload' if offload else ''}.json"
    tree = json.loads((ROOT / "configs" / "deepspeed" / f"zero{number or 1}.json").read_text())
    tree["zero_optimization"]["stage"] = number
    if offload:
        tree["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    path.write_text(json.dumps(tree))
    return str(path)


def settings(world: Path, output: Path, *more: str) -> list[str]:
    return ["train", *small(world, output), "training.keep=9", "evaluation=[]", *more]


def check_close(run: Path, whole: Path, tolerance: float) -> None:
    """Adapters as wholes, by the distance that they went in the last two steps; and losses."""
    ours, theirs, start = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run / "adapter", whole / "adapter", whole / "checkpoints" / "checkpoint-2" / "adapter")
    )
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    apart = sum((ours[name].double() - tensor).square().sum() for name, tensor in theirs.items()).sqrt()
    way = sum((start[name].double() - tensor).square().sum() for name, tensor in theirs.items()).sqrt()
    assert apart <= tolerance * way, (apart / way).item()
    losses = [[json.loads(line)["loss"] for line in (r / "metrics.jsonl").open()] for r in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=max(tolerance, 1e-6))


def different(run: Path, whole: Path) -> list[str]:
    """Names of the tensors in the last checkpoint that are not bit for bit the same."""
    found = []
    for path in (whole / "checkpoints" / "checkpoint-4").rglob("*.safetensors"):
        theirs = load_file(path)
        ours = load_file(run / path.relative_to(whole))
        assert ours.keys() == theirs.keys()
        found += [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    return found


def test_two_processes_save_and_one_goes_on_and_two_again(world, tmp_path, caplog):
    """ZeRO-2 × 2 → one process without DeepSpeed → ZeRO-3 × 2, each from the middle of the run."""
    whole, alone, again = tmp_path / "whole", tmp_path / "alone", tmp_path / "again"
    launch(tmp_path, [settings(world, whole, "training.deepspeed=zero2")])
    until(2, whole, alone)
    assert command(*settings(world, alone, "training.save_every=1"), "--resume") == 0
    assert "was written by 2 processes, and 1 go on from it" in caplog.text
    check_close(alone, whole, 1e-2)
    until(3, alone, again)
    launch(tmp_path, [[*settings(world, again, "training.deepspeed=zero3"), "--resume"]])
    check_close(again, whole, 1e-2)


GRID = [(0, 0, "float32"), (0, 0, "bfloat16"), (1, 0, "float32"), (1, 0, "bfloat16"), (2, 0, "float32")]
GRID += [(2, 0, "bfloat16"), (2, 1, "float32"), (3, 0, "float32"), (3, 0, "bfloat16"), (3, 1, "float32")]


@pytest.mark.slow
def test_each_stage_goes_on_exactly(world, tmp_path):
    """The same stage and number of processes: weights, master weights and moments end the same, bit for bit."""
    runs, pairs = [], []
    for number, offload, dtype in GRID:
        whole = tmp_path / f"whole-{number}-{offload}-{dtype}"
        again = tmp_path / f"again-{number}-{offload}-{dtype}"
        more = [f"training.deepspeed={stage(tmp_path, number, bool(offload))}", f"model.dtype={dtype}"]
        more += ["parts.language.dropout=0.1"]
        runs += [settings(world, whole, *more), ["until", "2", str(whole), str(again)]]
        runs += [[*settings(world, again, *more), "--resume"]]
        pairs.append((again, whole))
    launch(tmp_path, runs)
    assert {again.name: found for again, whole in pairs if (found := different(again, whole))} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "cause"), [("TERM", "SIGTERM"), ("INT", "Ctrl-C")])
def test_a_signal_to_one_process_stops_all_after_the_same_step(world, tmp_path, number, cause):
    run = tmp_path / "run"
    arguments = settings(world, run, "training.deepspeed=zero2", "training.max_steps=8", "plugins=[tests.killer]")
    printed = launch(tmp_path, [arguments], f"forward 5 {number}")
    assert printed.count(f"stopped by {cause} after step 5; checkpoint-5 is saved") == 1
    assert damage(run / "checkpoints" / "checkpoint-5") is None
    assert not (run / "checkpoints" / "checkpoint-6").exists()


@pytest.mark.slow
def test_half_precision_is_not_rounded_on_the_way(world, tmp_path):
    """bf16 with fp32 master weights (ZeRO-2 × 2) → fp32 (one process) → bf16 (ZeRO-3 × 2): masters and moments arrive
    as they were written, so that the steps after them are as long as they would have been."""
    whole, alone, again = tmp_path / "whole", tmp_path / "alone", tmp_path / "again"
    half = "model.dtype=bfloat16"
    launch(tmp_path, [settings(world, whole, "training.deepspeed=zero2", half)])
    until(2, whole, alone)
    assert command(*settings(world, alone, half, "training.save_every=1"), "--resume") == 0
    check_close(alone, whole, 0.3)
    until(3, alone, again)
    launch(tmp_path, [[*settings(world, again, "training.deepspeed=zero3", half), "--resume"]])
    check_close(again, whole, 0.3)
