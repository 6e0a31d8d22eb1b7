"""Loading processes: how they end, their memory, and the CPU threads that training leaves them."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mmdora.core.distributed import local_world_size
from mmdora.training.loader_workers import compute_threads, limited_threads, start_worker
from tests.test_runs import command

FAULTS = """
import resource
import sys
import numpy as np
from mmdora.training.loader_workers import keep_freed_memory

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(20):
    [np.ones(30_000_000, np.uint8) for _ in range(3)]  # made, and freed together
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    result = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(result.stdout)


def test_a_run_ends_its_workers_cleanly(world, tmp_path, monkeypatch):
    """torch terminates workers that do not end in time."""
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


@pytest.mark.parametrize(
    ("num_workers", "cores", "processes", "threads"),
    [(1, 2, 1, 1), (0, 2, 1, 2), (4, 2, 1, 1), (4, 64, 1, 60), (4, 64, 8, 4), (2, 4, 2, 1), (0, 3, 2, 1)],
)
def test_compute_threads_and_loading_processes_share_the_cores(num_workers, cores, processes, threads):
    assert compute_threads(num_workers, cores, processes) == threads
    assert processes * (threads + num_workers) <= cores or threads == 1


def test_threads_are_limited_during_training_only(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with limited_threads(num_workers=10_000):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    with limited_threads(num_workers=10_000):
        assert torch.get_num_threads() == before


def test_processes_on_this_machine_are_counted(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):  # an earlier test may have set them
        monkeypatch.delenv(name, raising=False)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun, deepspeed
        with monkeypatch.context() as patch:
            patch.setenv(name, "8")
            assert local_world_size() == 8
    assert local_world_size() == 1


def test_a_worker_survives_ctrl_c_and_computes_with_one_thread():
    loader = DataLoader(InterruptsItself(), num_workers=1, worker_init_fn=start_worker)
    assert [int(batch) for batch in loader] == [1, 1]


class InterruptsItself(Dataset):
    """Sends SIGINT to its own process, as a terminal does to all of them; an item is the number of threads."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return torch.get_num_threads()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is tuned")
def test_a_worker_reuses_its_memory():
    assert faults("kept") < faults("as it is") / 2
