"""PyAV: FFmpeg's own decoders, on every platform; finds each frame by its time, and seeks where that is nearer."""

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

BEGINNING = -(2**63)  # a time before every other
# In these a frame that no other refers to is marked so, and may be left out without a trace in the others.
SKIPPING = {"h264", "hevc"}


@VIDEO_READERS.register("pyav")
def open_pyav(path: Path) -> PyAVFile:
    """Any format that FFmpeg reads, AV1 and GIF among them."""
    return PyAVFile(path)


class PyAVFile:
    """A video whose packets were read once, so that the n-th frame is known by its time.

    Where packets tell no times (raw streams, B-frames in AVI) it decodes from the start and counts; it decodes from the
    start, too, where a seek is not exact (MPEG streams, WMV).
    """

    _frames: Iterator[Any]
    _wanted = BEGINNING  # the time of the frame that is looked for

    def __init__(self, path: Path):
        from av.video.reformatter import VideoReformatter

        self.path = path
        self._to_rgb = VideoReformatter()  # one for all frames: it keeps its tables
        self._open()
        self._packets: Packets | None = read_packets(self._container, self._stream)
        if self._packets is None:
            self._rewind()
            self.timeline = self._count()
        else:
            self._place: dict[int | None, int] = {pts: index for index, pts in enumerate(self._packets.pts)}
            self.timeline = self._packets.timeline
        self._at = len(self.timeline.times)  # the frame that the decoder gave last; here: past them all

    def close(self) -> None:
        self._frames = iter(())  # which holds this object, and would leave it to the garbage collector
        self._container.close()

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 [len(indices), height, width, 3]. Raises MediaError where one of the frames is damaged."""
        order = sorted(range(len(indices)), key=indices.__getitem__)
        first = self._rgb(self._frame(indices[order[0]]))
        frames = np.empty((len(indices), *first.shape), np.uint8)
        frames[order[0]] = first
        for before, at in pairwise(order):
            same = indices[before] == indices[at]
            frames[at] = frames[before] if same else self._rgb(self._frame(indices[at]), first.shape)
        return frames

    def _frame(self, index: int) -> Any:
        due = BEGINNING
        if self._packets is not None and self._stream.codec_context.name in SKIPPING:
            due = self._packets.pts[index]
        for start in self._starts(index):
            self._wanted = due if start != BEGINNING else BEGINNING  # the last resort decodes everything
            if start == BEGINNING:
                self._rewind()
            elif start is not None:
                self._container.seek(start, stream=self._stream)
                self._frames = self._decoded()
            for frame in self._frames:
                place = self._at + 1 if self._packets is None else self._place.get(frame.pts, -1)
                self._at = max(place, 0)
                if place == index and not frame.is_corrupt:
                    return frame
                if place >= index:
                    break
            self._at = len(self.timeline.times)  # nothing further is to be had from here
        raise MediaError(self.path, f"frame {index} of {len(self.timeline.times)} cannot be decoded")

    def _rgb(self, frame: Any, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
        """RGB [height, width, 3], turned as the file says; of `shape` where the size changes in mid-stream."""
        turns = round(frame.rotation / 90) % 4
        height, width = (frame.height, frame.width) if shape is None else (shape[1::-1] if turns % 2 else shape[:2])
        # One thread here too: a converter with threads that a forked process frees waits for them for ever.
        plane: Any = self._to_rgb.reformat(frame, width, height, "rgb24", threads=1).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        return np.rot90(rows[:, : 3 * width].reshape(height, width, 3), turns)

    def _decoded(self) -> Iterator[Any]:
        """The frames from here on, without those that come before the one wanted and that no other refers to."""
        for packet in self._container.demux(self._stream):
            early = packet.pts is not None and packet.pts < self._wanted
            self._stream.codec_context.skip_frame = "NONREF" if early else "DEFAULT"
            yield from packet.decode()

    def _starts(self, index: int) -> Iterator[int | None]:
        """Where to decode from, the cheapest first: here (None), at the time of a keyframe, at the one before, where a
        seek lands late or the first is damaged, at the BEGINNING."""
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
        # One thread: as many processes load samples as there are cores.
        self._stream.codec_context.thread_count = 1

    def _rewind(self) -> None:
        """Back to the very first packet: opened anew, since not every format can seek there."""
        self._container.close()
        self._open()
        self._frames = self._decoded()
        self._at = -1

    def _count(self) -> Timeline:
        """The frames by decoding all of them."""
        seen = [(f.time, f.key_frame, (f.width, f.height)) for f in self._frames]
        if not seen:
            raise MediaError(self.path, "the video has no frames")
        fps = float(self._stream.average_rate or 0)
        known = [time for time, _, _ in seen if time is not None]
        if len(known) == len(seen) and known == sorted(set(known)):
            times = tuple(time - known[0] for time in known)
        else:
            times = tuple(index / (fps or 1.0) for index in range(len(seen)))
        keys = tuple(index for index, (_, key, _) in enumerate(seen) if key)
        return Timeline(times, fps or rate_of(times), keys, seen[0][2])
