"""Decode videos in a child process that can be killed: a decoder that hangs or crashes costs one video, not the run.

Each process starts one child when it first needs it, and keeps it. The workers of a DataLoader are daemonic and may not
have multiprocessing children, so the child is a plain subprocess. Requests are sent over a socket; frames come back
through anonymous shared memory, which the kernel frees however the processes end.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Connection, Pipe
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np

from data_pipelines.samples import MediaError
from data_pipelines.video.registry import VIDEO_READERS, SampledVideo
from data_pipelines.video.sampling import Sampling

AVAILABLE = os.name == "posix"
START_TIMEOUT = 120.0  # seconds; separate from the timeout of a video
KEPT_BYTES = 2**27  # of shared memory between videos; more is freed at once


class Decoder:
    """A child process and the memory shared with it."""

    def __init__(self) -> None:
        self._connection, child_end = Pipe()
        self._memory = _shared_memory()
        fds = (child_end.fileno(), self._memory)
        # The same import path as the parent, plugins included. numpy needs no threads in the child.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "data_pipelines.video.child", *map(str, fds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=fds,
            env=environment,
        )
        child_end.close()
        # Unlike atexit, this also runs at the end of a process that multiprocessing started.
        self._close = Finalize(self, _close, (self._process, self._connection, self._memory), exitpriority=0)
        if not self._started():
            self._close()
            raise RuntimeError(
                "the decoding process does not start; its output is above. data.video.timeout=null decodes without it"
            )

    def decode(self, path: Path, reader: str, sampling: Sampling, timeout: float) -> SampledVideo | None:
        """Return the frames, or None if the child crashed. Raises MediaError for a video that cannot be decoded within
        `timeout` seconds."""
        try:
            self._connection.send((timeout, VIDEO_READERS[reader].__module__, (path, reader, sampling)))
            if not self._connection.poll(timeout):
                raise MediaError(path, f"decoding took more than {timeout:g} s (data.video.timeout)")
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._close()
            return None
        except BaseException:  # such as Ctrl-C: the next request must not get the answer to this one
            self._close()
            raise
        if answer[0] == "error":
            raise MediaError(*answer[1:])
        video, shape = answer[1:]
        frames = np.empty(shape, np.uint8)
        _read_all(self._memory, frames.reshape(-1).data)
        if frames.nbytes > KEPT_BYTES:
            os.ftruncate(self._memory, 0)
        return dataclasses.replace(video, frames=frames)

    @property
    def alive(self) -> bool:
        """Whether the child can take requests."""
        return self._close.still_active()

    @property
    def exit_reason(self) -> str:
        """The signal or exit code with which the child ended."""
        code = self._process.returncode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    @property
    def pid(self) -> int:
        """The process id of the child."""
        return self._process.pid

    def close(self) -> None:
        """End the child and free its resources."""
        self._close()

    def forget(self) -> None:
        """Close the copied file descriptors in a forked process; the child still belongs to the parent."""
        self._close.cancel()
        self._connection.close()
        os.close(self._memory)
        self._process.returncode = 0  # this process must not wait for it

    def _started(self) -> bool:
        try:
            return self._connection.poll(START_TIMEOUT) and self._connection.recv() == "ready"
        except (EOFError, OSError):
            return False


def _close(process: subprocess.Popen[bytes], connection: Connection, memory: int) -> None:
    connection.close()
    if process.poll() is None:
        process.kill()
    process.wait()
    os.close(memory)


def _shared_memory() -> int:
    """Return a file descriptor of anonymous memory. /dev/shm is not used, because it is small in containers."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mmdora-video")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _read_all(memory: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.preadv(memory, [data[done:]], done) if hasattr(os, "preadv") else _pread(memory, data, done)


def _pread(memory: int, data: memoryview, start: int) -> int:
    piece = os.pread(memory, len(data) - start, start)
    data[start : start + len(piece)] = piece
    return len(piece)


_decoder: Decoder | None = None
_lock = threading.Lock()  # one request at a time


def decode_in_child(path: Path, reader: str, sampling: Sampling, timeout: float) -> SampledVideo:
    """Decode a video as `decoding.decode` does, in the child of this process, which is restarted if it has ended.
    Raises MediaError."""
    global _decoder
    with _lock:
        for _ in range(2):  # the first child may have been killed for a reason unrelated to the file
            decoder = _decoder if _decoder is not None and _decoder.alive else Decoder()
            _decoder = decoder
            video = decoder.decode(path, reader, sampling, timeout)
            if video is not None:
                return video
        raise MediaError(path, f"the decoder crashed ({decoder.exit_reason})")


def stop() -> None:
    """End the child of this process, if any; the next video starts a new one."""
    global _decoder
    with _lock:
        if _decoder is not None:
            _decoder.close()
            _decoder = None


def _after_fork() -> None:
    global _decoder, _lock
    _lock = threading.Lock()
    if _decoder is not None and _decoder.alive:
        _decoder.forget()
    _decoder = None


if AVAILABLE:
    os.register_at_fork(after_in_child=_after_fork)
