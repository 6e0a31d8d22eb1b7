"""The decoding process: `python -m data_pipelines.video.child SOCKET MEMORY`, started by isolation.py.

It imports numpy and the readers, and never torch, so that it starts in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.samples import MediaError
from data_pipelines.video.decoding import decode

GRACE = 5.0  # seconds after the timeout at which the process ends itself, in case its parent is gone


def main(socket: int, memory: int) -> None:
    """Answer requests until the parent closes its end of the socket or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the socket
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a run that stops after the current step still needs its frames
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection = Connection(socket)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    connection.send("ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # silence the decoders; errors report what matters
    while True:
        limit, module, arguments = requests.get()
        # The signal of the kernel ends even a decoder that holds the interpreter lock.
        signal.setitimer(signal.ITIMER_REAL, limit + GRACE)
        answer = _answer(memory, module, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _receive(connection: Connection, requests: queue.SimpleQueue[Any]) -> None:
    """Queue requests. Runs in a thread, so that the death of the parent is noticed while decoding."""
    while True:
        try:
            requests.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def _answer(memory: int, module: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    path: Path = arguments[0]
    try:
        importlib.import_module(module)  # registers the reader of a plugin
        video = decode(*arguments)
        write_all(memory, video.frames.reshape(-1).data)
    except MediaError as error:
        return "error", error.path, error.reason
    except Exception as error:
        return "error", str(path), f"cannot be decoded ({type(error).__name__}: {error})"
    return "video", dataclasses.replace(video, frames=np.empty(0, np.uint8)), video.frames.shape


def write_all(memory: int, data: memoryview) -> None:
    """Write all of `data` to the start of the file `memory`; the kernel writes at most 2 GiB at once."""
    done = 0
    while done < len(data):
        done += os.pwrite(memory, data[done:], done)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
