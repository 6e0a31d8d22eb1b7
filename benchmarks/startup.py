"""Measure the time from the command to the first optimizer step, against a lower bound for any trainer.

    python benchmarks/startup.py --out benchmarks/results/startup.json

The lower bound ("limit") is a process that imports torch and transformers' Trainer and loads the model and its
processor. Both are whole processes and alternate; figures are medians of wall-clock seconds, and their ratio.
`mmdora train` is timed until the first line of metrics.jsonl, minus the duration of that step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import about_machine

ROOT = Path(__file__).parent.parent
LIMIT = """
import torch, mmdora.models
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
AutoModelForImageTextToText.from_pretrained("assets/tiny-llava")
AutoProcessor.from_pretrained("assets/tiny-llava")
"""


def limit() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", LIMIT], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def first_step(folder: Path) -> float:
    """Time the quickstart without its evaluation, which would run before the first step."""
    output = folder / "run"
    settings = [f"training.output={output}", "training.max_steps=1", "evaluation=[]"]
    command = [sys.executable, "train.py", "quickstart", *settings, "--overwrite"]
    start, metrics = time.perf_counter(), output / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (metrics.exists() and metrics.read_text(encoding="utf-8").endswith("\n")):
        if process.poll() is not None:
            raise RuntimeError(f"the run exited with code {process.returncode} before its first step")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    process.wait()
    step: float = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])["seconds"]
    return seconds - step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    limits, first_steps = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MMDORA_CACHE"] = folder
        first_step(Path(folder))  # warm-up: builds the data index and fills the page cache
        for _ in range(args.rounds):
            limits.append(limit())
            (Path(folder) / "run").rename(Path(folder) / f"run{len(first_steps)}")
            first_steps.append(first_step(Path(folder)))
    figures = {
        "limit_seconds": round(statistics.median(limits), 2),
        "first_step_seconds": round(statistics.median(first_steps), 2),
        "over_limit": round(statistics.median(first_steps) / statistics.median(limits), 3),
    }
    print(json.dumps(figures))
    if args.out is not None:
        args.out.write_text(json.dumps(about_machine() | figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
