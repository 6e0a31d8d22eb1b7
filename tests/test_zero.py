"""DeepSpeed with two real processes on the CPU, started by both launchers, with no compiler on the path."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.test_runs import command, small

TOKENS = "model.new_tokens=[<left>,<right>]"  # rows whose modules the engine must gather too
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    """The same run in one process without DeepSpeed."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    assert command("train", *small(world, output), TOKENS) == 0
    return output


def launch(launcher: list[str], arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Start two processes; compilers are hidden, so that anything which wants one fails here."""
    hidden = tmp_path / "bin"
    hidden.mkdir()
    for tool in ("gcc", "g++", "cc", "c++", "ninja", "nvcc"):
        (hidden / tool).write_text("#!/bin/sh\nexit 1\n")
        (hidden / tool).chmod(0o755)
    venv = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{hidden}:{venv}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    return subprocess.run(
        [*launcher, "train.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


LAUNCHERS = {
    "zero3": lambda: [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ],
    "zero2": lambda: [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus=2",
        f"--master_port={free_port()}",
    ],
}


@pytest.mark.parametrize("stage", ["zero3", "zero2"])
def test_two_processes_train_what_one_does(world, alone, tmp_path, stage):
    """Stage 3 under torchrun, stage 2 under deepspeed: the adapter is complete, and close to the single process's."""
    output = tmp_path / stage
    arguments = [*small(world, output), TOKENS, f"training.deepspeed={stage}"]
    done = launch(LAUNCHERS[stage](), arguments, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    expected = load_file(alone / "adapter" / "adapter_model.safetensors")
    actual = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in expected.items()}
    for key, tensor in expected.items():
        # By norm: where a gradient is all but zero, Adam's first steps are as large as any, and go by its rounding.
        assert (actual[key] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, key
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (output, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours = (output / "eval" / "counting" / "scores.jsonl").read_text()
    assert len(ours.splitlines()) == 6
