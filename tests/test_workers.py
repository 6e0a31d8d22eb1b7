"""What is set where a process that loads samples starts."""

from __future__ import annotations

import platform
import subprocess
import sys
from multiprocessing.process import BaseProcess

import pytest

from tests.test_runs import command

FAULTS = """
import resource
import sys
import numpy as np
from mmdora.training.loader_workers import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(20):
    [np.ones(30_000_000, np.uint8) for _ in range(3)]  # made, and freed together
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(how: str) -> int:
    result = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(result.stdout)


def test_a_run_ends_its_workers_without_waiting_in_vain(world, tmp_path, monkeypatch):
    """torch terminates those that did not hear that they are to end."""
    late = []
    monkeypatch.setattr(BaseProcess, "terminate", lambda process: late.append(process.pid))
    overrides = [
        f"data.train=[{{path: {world}/counting_train.json, format: shapes, take: first:8}}]",
        "evaluation=[]",
        "data.num_workers=1",
        "training.max_steps=2",
        f"training.output={tmp_path}/run",
    ]
    assert command("train", "quickstart", *overrides, "training.batch_size=4", "training.micro_batch_size=4") == 0
    assert late == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator, which is left as it is")
def test_a_worker_uses_its_memory_again():
    assert faults("kept") < faults("as it is") / 2
