"""Two real processes on the CPU without a compiler: DDP and ZeRO train like one process, for any mix of media.

The whole grid is in test_zero_grid.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.grid import Grid, deepspeed_file, free_port, launch, torchrun, write_combinations, write_mixed
from tests.processes import ranks, wait_for_all
from tests.test_runs import command, small

NEW_TOKENS = "model.new_tokens=[<left>,<right>]"  # the engine must gather the modules of their rows too
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
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Grid:
    """All runs that the tests of this file compare."""
    folder = tmp_path_factory.mktemp("grid")
    mixed, pairs = write_mixed(folder), write_combinations(folder)
    stage = {n: f"training.deepspeed={deepspeed_file(folder, f'stage{n}', n)}" for n in (0, 1, 3)}
    runs = Grid(folder, [*COMMON, f"data.train=[{{path: {pairs}, format: llava}}]"])
    benchmark = f"benchmark: vqa, data: {mixed}, format: llava, batch_size: 1"
    evaluation = (
        f"evaluation=[{{name: five, {benchmark}, limit: 5, before: true}}, {{name: single, {benchmark}, limit: 1}}]"
    )
    batches = [f"data.train=[{{path: {mixed}, format: llava}}]", "training.batch_size=8", "training.max_steps=4"]
    runs.add("pairs", "training.micro_batch_size=2")
    runs.add("mixed", *batches, evaluation)
    runs.run(processes=1)
    runs.add("pairs-ddp")
    checkpointed = ["training.micro_batch_size=1", "training.gradient_checkpointing=true"]
    runs.add("mixed-zero3", stage[3], *batches, *checkpointed, evaluation)
    half = ["model.dtype=bfloat16", "training.max_steps=3"]
    during = f"evaluation=[{{name: five, {benchmark}, limit: 5, during: true}}]"
    runs.add("bf16-zero0", stage[0], *half, record=False)
    runs.add("bf16-zero1", stage[1], *half, during, "training.evaluate_every=1", record=False)
    runs.run(processes=2)
    return runs


def test_two_processes_train_every_pair_of_media_kinds_like_one(grid):
    """The seventeenth step has one sample for two processes, and repeats another one."""
    name = "pairs-ddp"
    assert len(grid.metrics(name, "loss")) == 17
    assert grid.largest_difference(name, "pairs", steps=16) <= 1e-4
    assert grid.metrics(name, "grad_norm")[:16] == pytest.approx(grid.metrics("pairs", "grad_norm")[:16], rel=1e-3)
    grid.check_gradients(name, "pairs", steps=16)


def test_one_process_under_a_launcher_trains_like_one_without(grid, tmp_path):
    """Accelerate wraps the model in DDP then, which fails after a batch that leaves a parameter out."""
    output = tmp_path / "run"
    arguments = ["train.py", "quickstart", *grid.settings, "training.micro_batch_size=2", f"training.output={output}"]
    (done,) = wait_for_all(ranks(arguments, free_port(), count=1, environment={"OMP_NUM_THREADS": "1"}), limit=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").open()]
    assert losses == pytest.approx(grid.metrics("pairs", "loss"), rel=1e-4)


def test_zero3_with_accumulation_and_checkpointing_trains_and_answers_like_one_process(grid):
    """The processes have different numbers of questions, with other media and answers of different lengths."""
    assert grid.largest_difference("mixed-zero3", "mixed") <= 1e-4
    grid.check_gradients("mixed-zero3", "mixed")
    grid.check_adapter("mixed-zero3", "mixed")
    for entry, count in (("before/five", 5), ("five", 5), ("single", 1)):
        assert len(grid.answers("mixed", entry)) == count
        assert grid.answers("mixed-zero3", entry) == grid.answers("mixed", entry)
    assert len({len(answer) for answer in grid.answers("mixed", "five").values()}) > 1


def test_half_precision_trains_fp32_weights_at_every_stage(grid):
    """The step that DeepSpeed takes itself at stage 0 has no effect. The adapter is the fp32 copy, not its rounding.

    Stage 1 is evaluated after every step, with the adapter merged into the weights meanwhile.
    """
    for step in (1, 2, 3):
        report = json.loads((grid.folder / f"bf16-zero1/eval/during/step-{step}/five/report.json").read_text())
        assert report["receipt"]["adapter_weights"] == "merged"
    assert grid.metrics("bf16-zero0", "loss")[:2] == grid.metrics("bf16-zero1", "loss")[:2]
    assert grid.largest_difference("bf16-zero0", "bf16-zero1") <= 2e-3
    for name in ("bf16-zero0", "bf16-zero1"):
        tensors = [t for key, t in grid.adapter(name).items() if "lora_" in key]
        assert {str(t.dtype) for t in tensors} == {"torch.float32"}
        assert all((t != t.bfloat16()).any() for t in tensors)


FEW_QUESTIONS = ["evaluation.0.before=false", "evaluation.0.limit=3"]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    """A small quickstart in one process without DeepSpeed."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    assert command("train", *small(world, output, steps=3), NEW_TOKENS, *FEW_QUESTIONS) == 0
    return output


def deepspeed() -> list[str]:
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}"]


@pytest.mark.parametrize(
    ("launcher", "stage"), [(deepspeed, "zero2"), pytest.param(torchrun, "zero3", marks=pytest.mark.slow)]
)
def test_both_launchers_start_train_py(world, alone, tmp_path, launcher, stage):
    output = tmp_path / stage
    arguments = [*small(world, output, steps=3), NEW_TOKENS, *FEW_QUESTIONS, f"training.deepspeed={stage}"]
    done = launch([*launcher(), "train.py", *arguments], tmp_path, limit=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (tmp_path / "alone").symlink_to(alone)
    Grid(tmp_path, []).check_adapter(stage, "alone")
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (output, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    scores = (output / "eval" / "counting" / "scores.jsonl").read_text()
    assert len(scores.splitlines()) == 3
