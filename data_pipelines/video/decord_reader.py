"""decord: random access by frame index, on x86-64 Linux and Windows. It is imported only when it opens a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.samples import MediaError
from data_pipelines.video.packets import read_packets
from data_pipelines.video.registry import VIDEO_READERS

# decord reads this once, at import. Its default of 10,240 retries at the end of a file takes minutes for a truncated
# file; 256 are too few for the last frames of a valid file on a busy machine.
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")


@VIDEO_READERS.register("decord")
def open_decord(path: Path) -> DecordFile:
    """Common formats; rejects files for which decord would return other frames than requested."""
    return DecordFile(path)


class DecordFile:
    """One decord reader per file, reset when closed, because an idle one keeps filling its buffers.

    Frames are returned as numpy arrays: decord's tensor bridges are global state and not thread-safe.
    """

    def __init__(self, path: Path):
        import av
        from decord import VideoReader, cpu

        self.path = path
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(path, "the file has no video stream")
            stream = container.streams.video[0]
            packets = read_packets(container, stream)
        problem = "its packets have no presentation times" if packets is None else packets.decord_problem()
        if packets is None or problem is not None:
            raise MediaError(path, f"decord cannot read it exactly ({problem}); use data.video.reader=pyav")
        self.timeline = packets.timeline
        # One thread, because there are as many loading processes as cores.
        self._reader = VideoReader(str(path), ctx=cpu(0), num_threads=1)
        if len(self._reader) != len(packets.pts):
            self.close()
            raise MediaError(path, f"decord counts {len(self._reader)} frames instead of {len(packets.pts)}")

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return frames, uint8 [len(indices), height, width, 3], read-only: the memory of the reader, not a copy."""
        batch: Any = _Batch(self._reader.get_batch(list(indices)))
        return np.from_dlpack(batch).astype(np.uint8, copy=False)

    def close(self) -> None:
        """Reset the reader."""
        self._reader.seek(0)


class _Batch:
    """Wraps a decord array for `numpy.from_dlpack`: decord has the DLPack capsule, but not the methods around it."""

    def __init__(self, array: Any):
        self._array = array

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU
