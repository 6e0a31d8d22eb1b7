"""What the allocator does with memory that is freed."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let the process keep what it frees, for training on a CPU; only glibc can be told so.

    By default glibc returns large freed blocks to the system, so every activation of the next step is made of fresh
    pages, and writing to a page for the first time takes longer than to compute what is written.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
