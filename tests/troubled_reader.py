"""A plugin's video reader that hangs or crashes; the first line of the file says how."""

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
    """Hang, hang while holding the interpreter lock, crash, exit, raise, or decode the file."""
    behaviour = path.read_bytes()[:20].partition(b"\n")[0]
    if behaviour == b"hang":
        time.sleep(1000)
    if behaviour == b"hold":
        ctypes.PyDLL(None).sleep(1000)  # holds the interpreter lock, as a call into a decoder may
    if behaviour == b"crash":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == b"exit":
        os._exit(3)
    if behaviour == b"raise":
        raise KeyError("an error inside the decoder")
    return PyAVFile(path)
