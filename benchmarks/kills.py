"""Is a resumed run the run that nothing happened to? Kills it at random moments until it has ended often enough.

    python benchmarks/kills.py --out benchmarks/results/kills.json

One run, of two epochs and more on the shapes world with dropout and two workers, is done once undisturbed. Then it is
begun again and again; SIGKILL meets it at a moment drawn from a seed (while it starts, between steps, as soon as a
checkpoint is being written, while answers are generated), and `--resume` goes on, until it ends and its adapter is
compared bit for bit, and its metrics, scores and ledger line by line.
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


def begin(settings: list[str], resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(TRAIN), *settings, *(["--resume"] if resume else [])]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0


def newest(run: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max((int(path.name.rpartition("-")[2]) for path in run.glob("checkpoints/checkpoint-*")), default=0)


def writing(run: Path, process: int) -> bool:
    """Whether the process is in the middle of a checkpoint, or died there."""
    return any(path.name.endswith(f".{process}.new") for path in run.glob("checkpoints/.*"))


def reached(run: Path, phase: str, process: int, goes_on_from: int) -> bool:
    """Whether the process is where it is to be killed, but for a random while."""
    if phase == "start":
        return True
    if phase == "step":
        return lines(run) > goes_on_from
    if phase == "checkpoint":
        return writing(run, process)
    answers = run / "eval/counting/responses.jsonl"
    return answers.exists() and answers.stat().st_size > 0


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> bool:
    """False where the process ended before."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def kill_once(run: Path, settings: list[str], chance: random.Random) -> dict[str, Any] | None:
    """Begin or go on, and kill; None where the run ended first, which it may."""
    phase = chance.choice(PHASES)
    most = {"start": 12.0, "step": 3.0, "checkpoint": 0.03, "evaluation": 1.0}[phase]
    delay, goes_on_from = chance.uniform(0, most), newest(run)
    process = begin(settings, run.exists())
    if wait_for(process, lambda: reached(run, phase, process.pid, goes_on_from)):
        time.sleep(delay)
    process.kill()
    _, error = process.communicate()
    if process.returncode != -9:
        if process.returncode:
            raise RuntimeError(error.decode())
        return None
    return {
        "aimed_at": phase,
        "steps_recorded": lines(run),
        "newest_checkpoint": newest(run),
        "half_written": writing(run, process.pid),
    }


def differences(run: Path, whole: Path) -> list[str]:
    """What of a finished run is not as in the other."""
    found = []
    ours, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, whole))
    if ours.keys() != theirs.keys() or any(not torch.equal(ours[name], theirs[name]) for name in theirs):
        found.append("adapter")
    if metrics(run) != metrics(whole):
        found.append("metrics.jsonl")
    same = ("skipped.jsonl", "eval/counting/scores.jsonl", f"checkpoints/checkpoint-{STEPS}/state.json")
    return found + [name for name in same if (run / name).read_bytes() != (whole / name).read_bytes()]


def metrics(run: Path) -> list[list[Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[row[key] for key in ("step", "epoch", "loss", "grad_norm", "learning_rate")] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    chance, kills, rounds = random.Random(args.seed), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = begin(arguments(folder / "world", folder / "whole"), False)
        _, error = whole.communicate()
        if whole.returncode:
            raise RuntimeError(error.decode())
        while len(kills) < args.kills:
            run = folder / f"run-{len(rounds)}"
            settings, before = arguments(folder / "world", run), len(kills)
            while len(kills) < args.kills and (kill := kill_once(run, settings, chance)):
                kills.append(kill)
                print(len(kills), kill, flush=True)
            last = begin(settings, run.exists())
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
