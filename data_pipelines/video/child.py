"""The process that decodes: `python -m data_pipelines.video.child SOCKET MEMORY`. See isolation.py, which starts it.

Imports numpy and the readers, and never torch, so that it starts in a fraction of a second.
"""

from __future__ import annotations

import importlib
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_pipelines.samples import MediaError
from data_pipelines.video.decoding import decode

GRACE = 5.0  # seconds after which a request ends the process, whether or not its parent still lives to do so


def main(socket: int, memory: int) -> None:
    """Answer requests until the parent closes its end, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair; it closes the socket
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so is this: a run that ends after its step wants its frames
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection = Connection(socket)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    connection.send("ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what decoders say of broken files; errors say what matters
    while True:
        limit, module, arguments = requests.get()
        # By the kernel, whose signal ends even a decoder that holds the interpreter's lock.
        signal.setitimer(signal.ITIMER_REAL, limit + GRACE)
        answer = _answer(memory, module, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _receive(connection: Connection, requests: queue.SimpleQueue[Any]) -> None:
    """Hands requests on; a thread of its own, so that the parent's end is noticed in the midst of decoding."""
    while True:
        try:
            requests.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def _answer(memory: int, module: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    path: Path = arguments[0]
    try:
        importlib.import_module(module)  # readers of plugins register themselves
        clip = decode(*arguments)
        write_all(memory, clip.frames.reshape(-1).data)
    except MediaError as error:
        return "refused", error.path, error.reason
    except Exception as error:
        return "refused", str(path), f"cannot be decoded ({type(error).__name__}: {error})"
    return "clip", clip.frames.shape, clip.indices, clip.fps, clip.total_frames, clip.reader


def write_all(memory: int, data: memoryview) -> None:
    """All of `data` from the start of the file `memory`; the kernel takes at most 2 GiB at once."""
    done = 0
    while done < len(data):
        done += os.pwrite(memory, data[done:], done)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
