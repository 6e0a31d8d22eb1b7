"""Ctrl-C while a command works: one line instead of a traceback."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmdora.core.distributed import is_main

INTERRUPTED = 128 + signal.SIGINT  # exit code


@contextmanager
def interruptible(hint: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C inside the block into one line on stderr, which ends with `hint()`, and exit code 130.

    SIGINT works even if the process was started with the signal ignored, as shells do for `command &` in a script.
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        if is_main():
            sys.stderr.write(f"\ninterrupted: {hint()}\n")
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, previous)
