"""What the tests of ZeRO share: samples of all kinds, runs by name in few launches, and what of two runs must agree."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdora.training.batches import epoch_order
from tests.conftest import ROOT
from tests.grid_worker import LIMIT, Case
from tests.media import write_image, write_video

WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells its processes
KINDS = ("image", "video", "text", "both")
WORDS = ["red", "blue", "green", "circle", "square", "triangle", "left", "right", "up", "down", "two", "three"]
ANSWERS = (1, 2, 5, 40)  # words, unlike enough that a mean over means would show


def write_media(folder: Path) -> None:
    for i in range(3):
        write_image(folder / f"square{i}.png", i)
        write_image(folder / f"wide{i}.png", 10 + i, size=(150, 40))  # more crops
        write_video(folder / f"clip{i}.mp4", frames=4, size=(64, 48 + 16 * i))


def row(rng: random.Random, name: str, kind: str) -> dict[str, Any]:
    """One sample in LLaVA's layout."""
    seen = {
        "image": {"image": f"{rng.choice(('square', 'wide'))}{rng.randrange(3)}.png"},
        "video": {"video": f"clip{rng.randrange(3)}.mp4"},
        "text": {},
    }
    media = seen["image"] | seen["video"] if kind == "both" else seen[kind]
    marks = "".join(f"<{key}>\n" for key in media)
    question, answer = (" ".join(rng.choices(WORDS, k=k)) for k in (rng.randint(3, 30), rng.choice(ANSWERS)))
    turns = [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
    return {"id": name, **media, "conversations": turns}


def write_mixed(folder: Path) -> Path:
    """40 samples, ten of each kind, with questions and answers of all lengths."""
    rng = random.Random(0)
    write_media(folder)
    path = folder / "mixed.json"
    path.write_text(json.dumps([row(rng, str(i), KINDS[i % 4]) for i in range(40)]))
    return path


def write_combinations(folder: Path) -> Path:
    """Samples of which two processes with one each meet every pair of kinds, in the first 16 steps of seed 0; and a
    single one more, with which a process would be without a sample."""
    rng = random.Random(1)
    wanted = [kind for pair in ((a, b) for a in KINDS for b in KINDS) for kind in pair] + ["video"]
    rows: list[Any] = [None] * len(wanted)
    for place, kind in zip(epoch_order(len(wanted), seed=0, epoch=0), wanted, strict=True):
        rows[place] = row(rng, str(place), kind)
    path = folder / "combinations.json"
    path.write_text(json.dumps(rows))
    return path


def deepspeed_file(folder: Path, name: str, stage: int, **settings: Any) -> Path:
    """The shipped DeepSpeed config of the stage, with other settings; stage 0 has none."""
    tree = json.loads((ROOT / f"configs/deepspeed/zero{stage or 1}.json").read_text())
    tree["zero_optimization"] |= {"stage": stage} | settings
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tree))
    return path


@dataclass
class Grid:
    """Runs by name, in `folder`."""

    folder: Path
    settings: list[str]  # of all runs
    pending: list[Case] = field(default_factory=list)

    def add(self, name: str, *settings: str, record: bool = True) -> None:
        output = self.folder / name
        arguments = ["quickstart", *self.settings, f"training.output={output}", *settings]
        self.pending.append(Case(str(output), arguments, record))

    def run(self, processes: int) -> None:
        """All that were added, in one launch. Raises AssertionError with the end of the output where that dies."""
        cases, self.pending = self.pending, []
        plan = self.folder / f"plan{processes}.json"
        plan.write_text(json.dumps([asdict(case) for case in cases]))
        torchrun = ["torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}", "-m"]
        command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "tests.grid_worker", str(plan)]
        done = launch(command, self.folder, 60 + LIMIT * len(cases))
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-6000:]

    def metrics(self, name: str, key: str) -> list[float]:
        outcome = self.folder / name / "done"
        assert outcome.exists(), f"{name} was not finished"
        assert outcome.read_text() == "ok"
        return [json.loads(line)[key] for line in (self.folder / name / "metrics.jsonl").open()]

    def adapter(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name / "adapter" / "adapter_model.safetensors")

    def gradients(self, name: str) -> list[dict[str, Tensor]]:
        return torch.load(self.folder / name / "gradients.pt")

    def answers(self, name: str, entry: str) -> dict[str, str]:
        lines = (self.folder / name / "eval" / entry / "responses.jsonl").read_text().splitlines()
        return {line["id"]: line["response"] for line in map(json.loads, lines)}

    def largest_difference(self, name: str, reference: str, steps: int | None = None) -> float:
        """Of two runs' losses, relative."""
        ours, theirs = (self.metrics(run, "loss")[:steps] for run in (name, reference))
        assert len(ours) == len(theirs) > 0
        return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))

    def check_gradients(self, name: str, reference: str, steps: int | None = None) -> None:
        """Every trained parameter has one at every step, and it is the reference's."""
        ours, theirs = (self.gradients(run)[:steps] for run in (name, reference))
        assert len(ours) == len(theirs) > 0
        for step, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
            assert mine.keys() == expected.keys(), (step, mine.keys() ^ expected.keys())
            total = torch.stack([g.norm() for g in expected.values()]).norm()
            for key, gradient in expected.items():
                error = (mine[key] - gradient).norm()
                assert error <= 1e-3 * (gradient.norm() + 1e-3 * total), (name, step, key, float(error))

    def check_adapter(self, name: str, reference: str, tolerance: float = 1e-3) -> None:
        """The same tensors, close by norm: where a gradient is all but zero, Adam's first steps are as large as any,
        and go by its rounding."""
        ours, theirs = self.adapter(name), self.adapter(reference)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        for key, tensor in theirs.items():
            error = (ours[key].float() - tensor.float()).norm()
            assert error <= tolerance * tensor.float().norm() + 1e-6, (name, key, float(error))


def launch(command: list[str], folder: Path, limit: float) -> subprocess.CompletedProcess[str]:
    """Run with compilers hidden, so that anything which wants one fails here; killed after `limit` seconds."""
    hidden = folder / "bin"
    hidden.mkdir(exist_ok=True)
    for tool in ("gcc", "g++", "cc", "c++", "ninja", "nvcc"):
        (hidden / tool).write_text("#!/bin/sh\nexit 1\n")
        (hidden / tool).chmod(0o755)
    venv = str(Path(sys.executable).parent)
    # A test before this one may have been a world of its own, in this process, and listens at its port.
    own = {name: value for name, value in os.environ.items() if name not in WORLD}
    environment = {**own, "PATH": f"{hidden}:{venv}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
