"""A plugin's video reader that does what decoders do at their worst; the file's first line says which."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from data_pipelines.video.pyav_reader import PyAVFile
from data_pipelines.video.registry import VIDEO_READERS


@VIDEO_READERS.register("troubled")
def open_troubled(path: Path) -> PyAVFile:
    """Hangs, hangs with the interpreter's lock, crashes, ends, or decodes what it is given."""
    words = path.read_bytes()[:20].partition(b"\n")[0]
    if words == b"hang":
        time.sleep(1000)
    if words == b"hold":
        ctypes.PyDLL(None).sleep(1000)  # with the interpreter's lock, as a decoder's own call may
    if words == b"crash":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    if words == b"exit":
        os._exit(3)
    if words == b"odd":
        raise KeyError("a decoder's own mistake")
    return PyAVFile(path)
