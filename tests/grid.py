"""Runs in two processes, shared by all tests that need them, and comparisons between two runs."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdora.training.batches import epoch_order
from tests import grid_worker
from tests.conftest import ROOT
from tests.grid_worker import Case
from tests.media import write_image, write_video
from tests.processes import ranks, wait_for_all

KINDS = ("image", "video", "text", "both")
WORDS = ["red", "blue", "green", "circle", "square", "triangle", "left", "right", "up", "down", "two", "three"]
ANSWERS = (1, 2, 5, 40)  # words; they differ enough for a mean of means to be noticed


def write_media(folder: Path) -> None:
    for i in range(3):
        write_image(folder / f"square{i}.png", i)
        write_image(folder / f"wide{i}.png", 10 + i, size=(150, 40))  # more crops
        write_video(folder / f"clip{i}.mp4", frames=4, size=(64, 48 + 16 * i))


def row(rng: random.Random, name: str, kind: str) -> dict[str, Any]:
    """Return one sample in LLaVA's format."""
    media_of = {
        "image": {"image": f"{rng.choice(('square', 'wide'))}{rng.randrange(3)}.png"},
        "video": {"video": f"clip{rng.randrange(3)}.mp4"},
        "text": {},
    }
    media = media_of["image"] | media_of["video"] if kind == "both" else media_of[kind]
    marks = "".join(f"<{key}>\n" for key in media)
    question, answer = (" ".join(rng.choices(WORDS, k=k)) for k in (rng.randint(3, 30), rng.choice(ANSWERS)))
    turns = [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
    return {"id": name, **media, "conversations": turns}


def write_mixed(folder: Path) -> Path:
    """Write 40 samples, ten of each kind, with questions and answers of different lengths."""
    rng = random.Random(0)
    write_media(folder)
    path = folder / "mixed.json"
    path.write_text(json.dumps([row(rng, str(i), KINDS[i % 4]) for i in range(40)]))
    return path


def write_combinations(folder: Path) -> Path:
    """Write samples so that two processes with one sample each get every pair of kinds in the first 16 steps of seed 0.

    One more sample makes a last step in which one process would have no sample.
    """
    rng = random.Random(1)
    kinds = [kind for pair in ((a, b) for a in KINDS for b in KINDS) for kind in pair] + ["video"]
    rows: list[Any] = [None] * len(kinds)
    for place, kind in zip(epoch_order(len(kinds), seed=0, epoch=0), kinds, strict=True):
        rows[place] = row(rng, str(place), kind)
    path = folder / "combinations.json"
    path.write_text(json.dumps(rows))
    return path


def deepspeed_file(folder: Path, name: str, stage: int, **settings: Any) -> Path:
    """Write the shipped DeepSpeed config of a stage with other settings; stage 0 uses the config of stage 1."""
    tree = json.loads((ROOT / f"configs/deepspeed/zero{stage or 1}.json").read_text())
    tree["zero_optimization"] |= {"stage": stage} | settings
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tree))
    return path


class TwoProcesses:
    """Two processes that run one case after another (tests/grid_worker.py)."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mmdora-processes-"))
        self.number = 0
        arguments = ["-m", "tests.grid_worker", str(self.folder), str(os.getpid())]
        environment = launch_environment(self.folder)
        self.processes = ranks(arguments, free_port(), environment=environment, output=self.folder / "output.txt")

    def run(self, case: Case) -> tuple[str, str]:
        """Run a case; return its outcome ("ok" or the errors) and what it printed.

        Raises:
            AssertionError: the processes ended, e.g. because the case took too long.
        """
        before = len(self.output())
        done = self.folder / f"{self.number}.done"
        self._send(asdict(case))
        while not done.exists():
            assert self.running(), f"{case.arguments} ended the processes:\n{self.output()[-6000:]}"
            time.sleep(0.1)
        return done.read_text(), self.output()[before:]

    def running(self) -> bool:
        return all(process.running() for process in self.processes)

    def output(self) -> str:
        """Return what both processes printed."""
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        self._send(None)
        wait_for_all(self.processes, limit=30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self, content: dict[str, Any] | None) -> None:
        file = self.folder / f"{self.number}.json"
        file.with_suffix(".new").write_text(json.dumps(content))
        file.with_suffix(".new").rename(file)
        self.number += 1


@cache
def _start_two_processes(attempt: int) -> TwoProcesses:
    processes = TwoProcesses()
    atexit.register(processes.close)
    return processes


def two_processes() -> TwoProcesses:
    """Return the test session's two processes; start new ones if the last case ended them."""
    attempt = 0
    while not (processes := _start_two_processes(attempt)).running():
        attempt += 1
    return processes


def run_in_two_processes(arguments: list[str], output: Path, plugins: Path | None = None) -> str:
    """Run `mmdora train ARGUMENTS` in two processes; return what it printed. Raises AssertionError if it fails."""
    case = Case(str(output), arguments, plugins=None if plugins is None else str(plugins))
    outcome, printed = two_processes().run(case)
    assert outcome == "ok", outcome + printed[-3000:]
    return printed


@dataclass
class Grid:
    """Runs by name, in `folder`."""

    folder: Path
    settings: list[str]  # of all runs
    pending: list[Case] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)  # by name

    def add(self, name: str, *settings: str, record: bool = True) -> None:
        output = self.folder / name
        arguments = ["quickstart", *self.settings, f"training.output={output}", *settings]
        self.pending.append(Case(str(output), arguments, record))

    def run(self, processes: int) -> None:
        """Run all cases that were added: in this process, or in the session's two processes."""
        cases, self.pending = self.pending, []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for case in cases:
            outcome = grid_worker.run(case) if processes == 1 else two_processes().run(case)[0]
            self.outcomes[Path(case.output).name] = outcome
        torch.set_num_threads(threads)

    def metrics(self, name: str, key: str) -> list[float]:
        """Return a figure of every step. Raises AssertionError if the run failed."""
        assert self.outcomes[name] == "ok", self.outcomes[name]
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").open()]
        return [row[key] for row in rows if "eval" not in row]

    def adapter(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name / "adapter" / "adapter_model.safetensors")

    def gradients(self, name: str) -> list[dict[str, Tensor]]:
        return torch.load(self.folder / name / "gradients.pt")

    def answers(self, name: str, entry: str) -> dict[str, str]:
        lines = (self.folder / name / "eval" / entry / "responses.jsonl").read_text().splitlines()
        return {line["id"]: line["response"] for line in map(json.loads, lines)}

    def largest_difference(self, name: str, reference: str, steps: int | None = None) -> float:
        """Return the largest relative difference between two runs' losses."""
        ours, theirs = (self.metrics(run, "loss")[:steps] for run in (name, reference))
        assert len(ours) == len(theirs) > 0
        return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))

    def check_gradients(self, name: str, reference: str, steps: int | None = None) -> None:
        """Check that every trained parameter has the gradient of the reference at every step."""
        ours, theirs = (self.gradients(run)[:steps] for run in (name, reference))
        assert len(ours) == len(theirs) > 0
        for step, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
            assert actual.keys() == expected.keys(), (step, actual.keys() ^ expected.keys())
            total = torch.stack([g.norm() for g in expected.values()]).norm()
            for key, gradient in expected.items():
                error = (actual[key] - gradient).norm()
                assert error <= 1e-3 * (gradient.norm() + 1e-3 * total), (name, step, key, float(error))

    def check_adapter(self, name: str, reference: str, tolerance: float = 1e-3) -> None:
        """Check that two runs saved the same tensors up to a tolerance on each tensor's norm.

        Single elements may differ more: if a gradient is almost zero, rounding decides Adam's first steps, and these
        are as large as any.
        """
        ours, theirs = self.adapter(name), self.adapter(reference)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        for key, tensor in theirs.items():
            error = (ours[key].float() - tensor.float()).norm()
            assert error <= tolerance * tensor.float().norm() + 1e-6, (name, key, float(error))


def launch(command: list[str], folder: Path, limit: float) -> subprocess.CompletedProcess[str]:
    """Run a command without compilers on the path; it is killed after `limit` seconds."""
    environment = launch_environment(folder)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)


def launch_environment(folder: Path) -> dict[str, str]:
    """Return an environment that hides compilers, so that anything that needs one fails."""
    hidden = folder / "bin"
    hidden.mkdir(exist_ok=True)
    for tool in ("gcc", "g++", "cc", "c++", "ninja", "nvcc"):
        (hidden / tool).write_text("#!/bin/sh\nexit 1\n")
        (hidden / tool).chmod(0o755)
    venv = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{hidden}:{venv}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return environment | {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}


def torchrun() -> list[str]:
    options = ["--nproc_per_node=2", f"--master_port={free_port()}"]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
