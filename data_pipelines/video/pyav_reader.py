"""PyAV: FFmpeg's decoders, on every platform. Finds each frame by its time, and seeks if that needs less decoding."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.samples import MediaError
from data_pipelines.video.packets import Packets, rate_of, read_packets
from data_pipelines.video.registry import VIDEO_READERS, Timeline

BEGINNING = -(2**63)  # a time before all others
# Codecs that mark frames to which no other frame refers. These can be skipped without an effect on the others.
SKIPPABLE = {"h264", "hevc"}


@VIDEO_READERS.register("pyav")
def open_pyav(path: Path) -> PyAVFile:
    """Any format that FFmpeg reads, including AV1 and GIF."""
    return PyAVFile(path)


class PyAVFile:
    """A video whose packets are read once, so that the n-th frame can be found by its time.

    If the packets have no times (raw streams, B-frames in AVI), it decodes from the start and counts. It also decodes
    from the start if seeking is not exact (MPEG streams, WMV).
    """

    _frames: Iterator[Any]
    _target = BEGINNING  # the time of the requested frame

    def __init__(self, path: Path):
        from av.video.reformatter import VideoReformatter

        self.path = path
        self._to_rgb = VideoReformatter()  # shared by all frames: it keeps its tables
        self._open()
        self._packets: Packets | None = read_packets(self._container, self._stream)
        if self._packets is None:
            self._rewind()
            self.timeline = self._count()
        else:
            self._index: dict[int | None, int] = {pts: index for index, pts in enumerate(self._packets.pts)}
            self.timeline = self._packets.timeline
        self._at = len(self.timeline.times)  # index of the last decoded frame; here: after all of them

    def close(self) -> None:
        """Close the file."""
        self._frames = iter(())  # the generator refers to this object: breaks the reference cycle
        self._container.close()

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return frames, uint8 [len(indices), height, width, 3]. Raises MediaError if one is damaged."""
        order = sorted(range(len(indices)), key=indices.__getitem__)
        first = self._rgb(self._frame(indices[order[0]]))
        frames = np.empty((len(indices), *first.shape), np.uint8)
        frames[order[0]] = first
        for previous, current in pairwise(order):
            same = indices[previous] == indices[current]
            frames[current] = frames[previous] if same else self._rgb(self._frame(indices[current]), first.shape)
        return frames

    def _frame(self, index: int) -> Any:
        time = BEGINNING
        if self._packets is not None and self._stream.codec_context.name in SKIPPABLE:
            time = self._packets.pts[index]
        for start in self._starts(index):
            self._target = time if start != BEGINNING else BEGINNING  # the last attempt decodes everything
            if start == BEGINNING:
                self._rewind()
            elif start is not None:
                self._container.seek(start, stream=self._stream)
                self._frames = self._decoded()
            for frame in self._frames:
                current = self._at + 1 if self._packets is None else self._index.get(frame.pts, -1)
                self._at = max(current, 0)
                if current == index and not frame.is_corrupt:
                    return frame
                if current >= index:
                    break
            self._at = len(self.timeline.times)  # the frame cannot be reached from here
        raise MediaError(self.path, f"frame {index} of {len(self.timeline.times)} cannot be decoded")

    def _rgb(self, frame: Any, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
        """Return RGB [height, width, 3], rotated as the file specifies, and scaled to `shape` if the size changes
        within the stream."""
        turns = round(frame.rotation / 90) % 4
        height, width = (frame.height, frame.width) if shape is None else (shape[1::-1] if turns % 2 else shape[:2])
        # One thread: a converter with threads would wait for them forever when a forked process frees it.
        plane: Any = self._to_rgb.reformat(frame, width, height, "rgb24", threads=1).planes[0]
        lines = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        return np.rot90(lines[:, : 3 * width].reshape(height, width, 3), turns)

    def _decoded(self) -> Iterator[Any]:
        """Decode frames from the present position, except those before the target to which no other frame refers."""
        for packet in self._container.demux(self._stream):
            early = packet.pts is not None and packet.pts < self._target
            self._stream.codec_context.skip_frame = "NONREF" if early else "DEFAULT"
            yield from packet.decode()

    def _starts(self, index: int) -> Iterator[int | None]:
        """Iterate over the times to decode from, the cheapest first: the present position (None), the nearest keyframe,
        the one before it (if a seek lands late or the nearest is damaged), and the BEGINNING."""
        if self._packets is None or not self._packets.seekable:
            if self._at < index:
                yield None
            yield BEGINNING
            return
        nearest = bisect_right(self._packets.keys, index) - 1
        if self._at < index and (nearest < 0 or self._packets.keys[nearest] <= self._at + 1):
            yield None
        yield from (self._packets.pts[self._packets.keys[k]] for k in (nearest, nearest - 1) if k >= 0)
        yield BEGINNING

    def _open(self) -> None:
        import av

        self._container = av.open(str(self.path))
        if not self._container.streams.video:
            self._container.close()
            raise MediaError(self.path, "the file has no video stream")
        self._stream = self._container.streams.video[0]
        # One thread, because there are as many loading processes as cores.
        self._stream.codec_context.thread_count = 1

    def _rewind(self) -> None:
        """Return to the first packet by opening the file again, because not every format can seek there."""
        self._container.close()
        self._open()
        self._frames = self._decoded()
        self._at = -1

    def _count(self) -> Timeline:
        """Return the timeline by decoding all frames."""
        frames = [(f.time, f.key_frame, (f.width, f.height)) for f in self._frames]
        if not frames:
            raise MediaError(self.path, "the video has no frames")
        fps = float(self._stream.average_rate or 0)
        known = [time for time, _, _ in frames if time is not None]
        if len(known) == len(frames) and known == sorted(set(known)):
            times = tuple(time - known[0] for time in known)
        else:
            times = tuple(index / (fps or 1.0) for index in range(len(frames)))
        keys = tuple(index for index, (_, key, _) in enumerate(frames) if key)
        return Timeline(times, fps or rate_of(times), keys, frames[0][2])
