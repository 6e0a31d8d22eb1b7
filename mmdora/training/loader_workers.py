"""The processes that load samples for a run: how they start, end, and what of their errors is shown."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mmdora.core.errors import UserError

# Of glibc's malloc.h, with the largest value that it takes for the first.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD = 32 * 2**20  # bytes
TRIM_THRESHOLD = 128 * 2**20


def start_worker(worker: int) -> None:
    """`worker_init_fn` of every loader."""
    keep_freed_memory()
    _outlive_sigterm()


def keep_freed_memory() -> None:
    """Have this process use one picture's memory again for the next.

    glibc gives freed memory of that size back to the kernel and gets it anew, page by page: two thirds of a worker's
    page faults (benchmarks/data.py has its speed with and without). Up to 128 MiB are kept; other allocators, and
    other systems, are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def _outlive_sigterm() -> None:
    """SIGTERM goes to whole process groups, and the last step needs its samples: a worker ends when its parent says so,
    or is gone."""
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def as_workers_said() -> Iterator[None]:
    """Raises a UserError of a loader's worker process as it was, without the traceback that torch puts around it."""
    try:
        yield
    except UserError as error:
        _, wrapped, message = str(error).rpartition("mmdora.core.errors.UserError: ")
        raise UserError(message.strip()) from error if wrapped else None
