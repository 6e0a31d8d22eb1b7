"""decord: random access by frame index, where it has wheels (x86-64 Linux and Windows)."""

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

# decord reads this once, at import. Its own 10,240 retries at the end of a file take minutes on a truncated one; 256
# are too few for the last frames of a good one on a busy machine.
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")


@VIDEO_READERS.register("decord")
def open_decord(path: Path) -> DecordFile:
    """The common formats; refuses a file of which decord would give other frames than those asked for."""
    return DecordFile(path)


class DecordFile:
    """One decord reader a file, emptied when closed: an idle one goes on filling its buffers.

    Frames leave as numpy arrays, since decord's tensor bridges are global state and not thread-safe.
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
        trouble = "its packets do not tell when they are shown" if packets is None else packets.decord_trouble()
        if packets is None or trouble is not None:
            raise MediaError(path, f"decord cannot read it exactly ({trouble}); data.video.reader: pyav can")
        self.timeline = packets.timeline
        # One thread: as many processes load samples as there are cores.
        self._reader = VideoReader(str(path), ctx=cpu(0), num_threads=1)
        if len(self._reader) != len(packets.pts):
            self.close()
            raise MediaError(path, f"decord counts {len(self._reader)} frames where there are {len(packets.pts)}")

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 [len(indices), height, width, 3], read-only: the reader's own memory, not a copy."""
        batch: Any = _Batch(self._reader.get_batch(list(indices)))
        return np.from_dlpack(batch).astype(np.uint8, copy=False)

    def close(self) -> None:
        self._reader.seek(0)


class _Batch:
    """A decord array as numpy takes one over: decord has DLPack's capsule, not the methods around it."""

    def __init__(self, array: Any):
        self._array = array

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU
