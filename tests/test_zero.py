"""Two real processes on the CPU, with no compiler on the path: DDP and ZeRO train what one process does, and no mix of
pictures, clips and text stops them. The whole grid is in test_zero_grid.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.grid import Grid, deepspeed_file, free_port, launch, write_combinations, write_mixed
from tests.test_runs import command, small

TOKENS = "model.new_tokens=[<left>,<right>]"  # rows whose modules the engine must gather too
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Grid:
    """All runs of this file, in two launches."""
    folder = tmp_path_factory.mktemp("grid")
    mixed, pairs = write_mixed(folder), write_combinations(folder)
    stage = {n: f"training.deepspeed={deepspeed_file(folder, f'stage{n}', n)}" for n in (0, 1, 3)}
    made = Grid(folder, [*COMMON, f"data.train=[{{path: {pairs}, format: llava}}]"])
    asked = f"benchmark: vqa, data: {mixed}, format: llava, batch_size: 1"
    questions = f"evaluation=[{{name: five, {asked}, limit: 5, before: true}}, {{name: single, {asked}, limit: 1}}]"
    batches = [f"data.train=[{{path: {mixed}, format: llava}}]", "training.batch_size=8", "training.max_steps=4"]
    for name, more in {"pairs": ["training.micro_batch_size=2"], "mixed": [*batches, questions]}.items():
        made.add(name, *more)
    made.run(processes=1)
    made.add("pairs-ddp")
    made.add("pairs-zero1", stage[1])
    made.add("pairs-zero3", stage[3])
    checkpointed = ["training.micro_batch_size=1", "training.gradient_checkpointing=true"]
    made.add("mixed-zero3", stage[3], *batches, *checkpointed, questions)
    for n in (0, 1):
        made.add(f"bf16-zero{n}", stage[n], "model.dtype=bfloat16", "training.max_steps=3", record=False)
    made.run(processes=2)
    return made


COMMON = [
    "data.num_workers=0",
    "data.video.num_frames=2",
    "data.max_skipped=0",
    "training.seed=0",
    "training.max_steps=17",
    "training.batch_size=2",
    "training.micro_batch_size=1",
    "training.warmup_ratio=0",
    "training.save_every=null",
    "evaluation=[]",
]


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero3"])
def test_every_pair_of_kinds_on_two_processes(grid, engine):
    """The seventeenth step has one sample for two processes, and repeats another."""
    name = f"pairs-{engine}"
    assert len(grid.metrics(name, "loss")) == 17
    assert grid.largest_difference(name, "pairs", steps=16) <= 1e-4
    assert grid.metrics(name, "grad_norm")[:16] == pytest.approx(grid.metrics("pairs", "grad_norm")[:16], rel=1e-3)
    grid.check_gradients(name, "pairs", steps=16)


def test_accumulated_and_checkpointed_in_partitions(grid):
    """And evaluated where processes have unequally many questions, of other kinds, with answers of other lengths."""
    assert grid.largest_difference("mixed-zero3", "mixed") <= 1e-4
    grid.check_gradients("mixed-zero3", "mixed")
    grid.check_adapter("mixed-zero3", "mixed")
    for entry, count in (("before/five", 5), ("five", 5), ("single", 1)):
        assert len(grid.answers("mixed", entry)) == count
        assert grid.answers("mixed-zero3", entry) == grid.answers("mixed", entry)
    assert len({len(answer) for answer in grid.answers("mixed", "five").values()}) > 1


def test_half_precision_learns_in_fp32_at_every_stage(grid):
    """At stage 0 DeepSpeed's own first step has no part in it. What is saved is the fp32 copy, not its rounding."""
    assert grid.metrics("bf16-zero0", "loss")[:2] == grid.metrics("bf16-zero1", "loss")[:2]
    assert grid.largest_difference("bf16-zero0", "bf16-zero1") <= 2e-3
    for name in ("bf16-zero0", "bf16-zero1"):
        tensors = [t for key, t in grid.adapter(name).items() if "lora_" in key]
        assert {str(t.dtype) for t in tensors} == {"torch.float32"}
        assert all((t != t.bfloat16()).any() for t in tensors)


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    """The shipped quickstart in one process without DeepSpeed."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    assert command("train", *small(world, output), TOKENS) == 0
    return output


def torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]


def deepspeed() -> list[str]:
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}"]


@pytest.mark.parametrize(
    ("launcher", "stage"), [(deepspeed, "zero2"), pytest.param(torchrun, "zero3", marks=pytest.mark.slow)]
)
def test_both_launchers_start_train_py(world, alone, tmp_path, launcher, stage):
    output = tmp_path / stage
    arguments = [*small(world, output), TOKENS, f"training.deepspeed={stage}"]
    done = launch([*launcher(), "train.py", *arguments], tmp_path, limit=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runs = Grid(tmp_path, [])
    (tmp_path / "alone").symlink_to(alone)
    runs.check_adapter(stage, "alone")
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (output, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours = (output / "eval" / "counting" / "scores.jsonl").read_text()
    assert len(ours.splitlines()) == 6
