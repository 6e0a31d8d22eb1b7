"""Check that a run that is killed and resumed ends like an undisturbed one, by killing it at random moments.

    python benchmarks/kills.py --out benchmarks/results/kills.json

A run of more than two epochs on the shapes data, with dropout and two workers, is done once undisturbed. Then it is
started repeatedly and killed by SIGKILL at seeded random moments: during startup, between steps, while a checkpoint is
written, or while answers are generated. `--resume` continues it until it finishes. Then its adapter is compared bit for
bit, and its metrics, scores and ledger line by line.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import about_machine
from safetensors.torch import load_file

TRAIN = Path(__file__).parents[1] / "train.py"
STEPS = 40
PHASES = ("start", "step", "step", "step", "checkpoint", "checkpoint", "evaluation")


def arguments(world: Path, output: Path) -> list[str]:
    data = f"{world}/counting_held_out.json, format: shapes"
    return [
        *("quickstart", f"data.train=[{{path: {data}, take: 'first:80'}}]", "data.num_workers=2"),
        *("parts.language.dropout=0.1", f"training.output={output}", f"training.max_steps={STEPS}"),
        *("training.batch_size=8", "training.micro_batch_size=4", "training.save_every=2"),
        f"evaluation=[{{name: counting, benchmark: vqa, data: {data}, limit: 20}}]",
    ]


def start_run(settings: list[str], resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(TRAIN), *settings, *(["--resume"] if resume else [])]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def count_lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0


def newest_checkpoint(run: Path) -> int:
    """Return the step of the newest checkpoint; 0 without one."""
    return max((int(path.name.rpartition("-")[2]) for path in run.glob("checkpoints/checkpoint-*")), default=0)


def is_writing_checkpoint(run: Path, process: int) -> bool:
    """Return whether the process is writing a checkpoint, or was killed while doing so."""
    return any(path.name.endswith(f".{process}.new") for path in run.glob("checkpoints/.*"))


def has_reached(run: Path, phase: str, process: int, resumed_from: int) -> bool:
    """Return whether the process has reached the phase in which it is to be killed after a random delay."""
    if phase == "start":
        return True
    if phase == "step":
        return count_lines(run) > resumed_from
    if phase == "checkpoint":
        return is_writing_checkpoint(run, process)
    answers = run / "eval/counting/responses.jsonl"
    return answers.exists() and answers.stat().st_size > 0


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> bool:
    """Wait until `condition` holds; return False if the process exits first."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def kill_once(run: Path, settings: list[str], rng: random.Random) -> dict[str, Any] | None:
    """Start or resume a run and kill it; return None if the run finishes first."""
    phase = rng.choice(PHASES)
    max_delay = {"start": 12.0, "step": 3.0, "checkpoint": 0.03, "evaluation": 1.0}[phase]
    delay, resumed_from = rng.uniform(0, max_delay), newest_checkpoint(run)
    process = start_run(settings, run.exists())
    if wait_for(process, lambda: has_reached(run, phase, process.pid, resumed_from)):
        time.sleep(delay)
    process.kill()
    _, error = process.communicate()
    if process.returncode != -9:
        if process.returncode:
            raise RuntimeError(error.decode())
        return None
    return {
        "aimed_at": phase,
        "steps_recorded": count_lines(run),
        "newest_checkpoint": newest_checkpoint(run),
        "half_written": is_writing_checkpoint(run, process.pid),
    }


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Return the names of what differs between two finished runs."""
    differing = []
    resumed_adapter, undisturbed_adapter = (
        load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, undisturbed)
    )
    if resumed_adapter.keys() != undisturbed_adapter.keys() or any(
        not torch.equal(resumed_adapter[name], undisturbed_adapter[name]) for name in undisturbed_adapter
    ):
        differing.append("adapter")
    if metrics(run) != metrics(undisturbed):
        differing.append("metrics.jsonl")
    files = ("skipped.jsonl", "eval/counting/scores.jsonl", f"checkpoints/checkpoint-{STEPS}/state.json")
    return differing + [name for name in files if (run / name).read_bytes() != (undisturbed / name).read_bytes()]


def metrics(run: Path) -> list[list[Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[row[key] for key in ("step", "epoch", "loss", "grad_norm", "learning_rate")] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    rng, kills, rounds = random.Random(args.seed), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = start_run(arguments(folder / "world", folder / "whole"), False)
        _, error = undisturbed.communicate()
        if undisturbed.returncode:
            raise RuntimeError(error.decode())
        while len(kills) < args.kills:
            run = folder / f"run-{len(rounds)}"
            settings, before = arguments(folder / "world", run), len(kills)
            while len(kills) < args.kills and (kill := kill_once(run, settings, rng)):
                kills.append(kill)
                print(len(kills), kill, flush=True)
            last = start_run(settings, run.exists())
            _, error = last.communicate()
            if last.returncode:
                raise RuntimeError(error.decode())
            rounds.append({"kills": len(kills) - before, "differences": differences(run, folder / "whole")})
            print(rounds[-1], flush=True)
    figures = {
        "kills": len(kills),
        "aimed_at": Counter(kill["aimed_at"] for kill in kills),
        "half_written_checkpoints": sum(kill["half_written"] for kill in kills),
        "steps_done_twice": sum(kill["steps_recorded"] - kill["newest_checkpoint"] for kill in kills),
        "runs": len(rounds),
        "runs_that_differ": sum(bool(r["differences"]) for r in rounds),
    }
    print(json.dumps(figures))
    if args.out is not None:
        content = {"about": about_machine(), "steps": STEPS, **figures, "rounds": rounds, "each_kill": kills}
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
