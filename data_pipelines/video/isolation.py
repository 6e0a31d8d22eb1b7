"""Decoding in a process that can be killed: a decoder that hangs or crashes costs one video, not the run.

One child a process, started when first needed and kept. DataLoader's workers are daemonic and may have no
multiprocessing children, so it is a plain subprocess; requests go over a socket, frames come back through memory that
both share and that has no name, so that nothing is left behind however either ends.
"""

from __future__ import annotations

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
from data_pipelines.video.registry import VIDEO_READERS, VideoClip
from data_pipelines.video.sampling import Sampling

AVAILABLE = os.name == "posix"
START_LIMIT = 120.0  # seconds; a child that takes longer to start says nothing of the video
KEPT_BYTES = 2**27  # of shared memory between clips; a larger clip's is given back at once


class Decoder:
    """The child of this process, and the memory that it shares."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self._memory = _shared_memory()
        fds = (theirs.fileno(), self._memory)
        # The child finds what its parent finds, plugins included; numpy needs no threads there.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "data_pipelines.video.child", *map(str, fds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=fds,
            env=environment,
        )
        theirs.close()
        # Runs at the end of a process that multiprocessing started, where atexit does not.
        self._close = Finalize(self, _close, (self._process, self._connection, self._memory), exitpriority=0)
        if not self._started():
            self._close()
            raise RuntimeError(
                "the decoding process does not start; what it says is above. data.video.timeout=null does without"
            )

    def decode(self, path: Path, reader: str, wanted: Sampling, timeout: float) -> VideoClip | None:
        """The clip, or None where the child crashed. Raises MediaError for a video that cannot be decoded in `timeout`
        seconds."""
        try:
            self._connection.send((timeout, VIDEO_READERS[reader].__module__, (path, reader, wanted)))
            if not self._connection.poll(timeout):
                raise MediaError(path, f"decoding took over {timeout:g} s (data.video.timeout)")
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._close()
            return None
        except BaseException:  # Ctrl-C: else the next request would get the answer to this one
            self._close()
            raise
        if answer[0] == "refused":
            raise MediaError(*answer[1:])
        frames = np.empty(answer[1], np.uint8)
        _read_all(self._memory, frames.reshape(-1).data)
        if frames.nbytes > KEPT_BYTES:
            os.ftruncate(self._memory, 0)
        return VideoClip(frames, *answer[2:])

    @property
    def alive(self) -> bool:
        return self._close.still_active()

    @property
    def ending(self) -> str:
        """How a child that is gone ended."""
        code = self._process.returncode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End the child, and give back what it used."""
        self._close()

    def forget(self) -> None:
        """In a process forked off: the child is the parent's; only the copies of its file descriptors go."""
        self._close.cancel()
        self._connection.close()
        os.close(self._memory)
        self._process.returncode = 0  # nothing to wait for

    def _started(self) -> bool:
        try:
            return self._connection.poll(START_LIMIT) and self._connection.recv() == "ready"
        except (EOFError, OSError):
            return False


def _close(process: subprocess.Popen[bytes], connection: Connection, memory: int) -> None:
    connection.close()
    if process.poll() is None:
        process.kill()
    process.wait()
    os.close(memory)


def _shared_memory() -> int:
    """A file descriptor of memory without a name. Not in /dev/shm, which containers keep small."""
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
_lock = threading.Lock()  # threads take turns


def decode_apart(path: Path, reader: str, wanted: Sampling, timeout: float) -> VideoClip:
    """As `decoding.decode`, in this process's child, which is started anew after it ended. Raises MediaError."""
    global _decoder
    with _lock:
        for _ in range(2):  # the first may have been killed by what has nothing to do with the file
            decoder = _decoder if _decoder is not None and _decoder.alive else Decoder()
            _decoder = decoder
            clip = decoder.decode(path, reader, wanted, timeout)
            if clip is not None:
                return clip
        raise MediaError(path, f"the decoder crashed ({decoder.ending})")


def stop() -> None:
    """End this process's child, if it has one; the next video starts another."""
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
