"""Processes that load samples: how they start and end, what they report, and how they share the CPU with training."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmdora.core.distributed import local_world_size
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)

# mallopt parameters, from glibc's malloc.h. MMAP_THRESHOLD is the largest value that glibc accepts.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD = 32 * 2**20  # bytes
TRIM_THRESHOLD = 128 * 2**20


def compute_threads(num_workers: int, cores: int, processes: int = 1) -> int:
    """Return how many compute threads each training process on a machine may use, at least 1.

    Compute threads and loading processes share the cores: each of `processes` training processes has `num_workers`
    loading processes, of one thread each (torch sets that). More threads than cores are slow, because a parallel
    operation waits for its slowest thread: two threads beside one loading process on two cores cost 1.27x.
    """
    return max(1, cores // processes - num_workers)


@contextmanager
def limited_threads(num_workers: int) -> Iterator[None]:
    """Leave cores to the loading processes while the block trains (`compute_threads`).

    OMP_NUM_THREADS wins where it is set; torchrun sets it to 1 for several processes. Evaluation before and after
    training has no loading processes and encodes in this process, so it keeps torch's default, one thread per core.
    torch's default is never exceeded: it does not count hyper-threads.
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(before, compute_threads(num_workers, available_cores(), local_world_size())))
    log.info("compute threads: %d, loading processes: %d", torch.get_num_threads(), num_workers)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cores() -> int:
    """Return the number of cores that this process may use (taskset, Slurm and containers restrict them)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_worker(worker: int) -> None:
    """Set up a loading process: the `worker_init_fn` of every DataLoader."""
    keep_freed_memory()
    _ignore_stop_signals()


def keep_freed_memory() -> None:
    """Make this process reuse the memory of one image for the next.

    By default, glibc returns freed memory of that size to the kernel and requests it again, page by page: two thirds of
    a worker's page faults (benchmarks/data.py measures the speed with and without). Up to 128 MiB are kept. Other
    allocators and systems are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def _ignore_stop_signals() -> None:
    """Let a worker outlive Ctrl-C and SIGTERM, which reach the whole process group: the last step needs its samples.

    The worker ends when its parent closes the loader, sends it SIGTERM, or is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def unwrapped_worker_errors() -> Iterator[None]:
    """Raise a UserError of a loading process as it was, without the traceback that torch adds to its message."""
    try:
        yield
    except UserError as error:
        _, wrapped, message = str(error).rpartition("mmdora.core.errors.UserError: ")
        raise UserError(message.strip()) from error if wrapped else None
