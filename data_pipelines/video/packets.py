"""Read the frames of a file from its packets, without decoding: their number, times and keyframes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from data_pipelines.video.registry import Timeline

if TYPE_CHECKING:
    from av.container import InputContainer

# Containers without presentation times: FFmpeg guesses them, wrongly if frames are not stored in presentation order.
WITHOUT_TIMES = {"avi", "h264", "hevc", "m4v", "mpegvideo"}
# Containers in which a seek lands on the requested keyframe. In others (MPEG streams, WMV) it may land anywhere, and
# decoding from there may give other frames.
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"}
# Pixel formats that decord (with its FFmpeg 4), TorchCodec and PyAV convert to identical RGB if width and height are
# even.
SAME_COLORS = {"yuv420p", "yuvj420p"}


@dataclass(frozen=True)
class Packets:
    """The packets of a video stream."""

    pts: tuple[int, ...]  # presentation times in units of the time base, ascending
    keys: tuple[int, ...]  # indices of the keyframes in presentation order
    stored: tuple[int, ...]  # indices of the keyframes in storage order
    unit: float  # the time base, in seconds
    fps: float
    size: tuple[int, int]  # width, height
    container: str
    pixels: str  # the pixel format

    @property
    def seekable(self) -> bool:
        """Whether a seek to a keyframe lands exactly on it."""
        return self.container in SEEKABLE

    @property
    def same_colors(self) -> bool:
        """Whether all readers convert the pixels to the same RGB."""
        return self.pixels in SAME_COLORS and self.size[0] % 2 == self.size[1] % 2 == 0

    @cached_property
    def timeline(self) -> Timeline:
        """Times, rate, keyframes and size."""
        times = tuple((pts - self.pts[0]) * self.unit for pts in self.pts)
        return Timeline(times, self.fps or rate_of(times), self.keys, self.size)

    def decord_problem(self) -> str | None:
        """Return why decord 0.6 would return other frames than requested, or None (tests/test_video.py has examples).

        decord counts from keyframes in storage order, and relies on every seek being exact.
        """
        if not self.seekable:
            return f"seeking in {self.container} is not exact"
        if self.stored != self.keys:
            return "its keyframes are not stored in presentation order"
        if not self.same_colors:
            return f"its pixels, {self.pixels} of {self.size[0]}×{self.size[1]}, are not converted to RGB exactly"
        return None


def read_packets(container: InputContainer, stream: Any) -> Packets | None:
    """Read the packets of a video stream in one pass over the file, which leaves the container at its end. Returns None
    if the packets lack presentation times."""
    packets = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            packets.append((packet.pts, packet.is_keyframe))
    pts = [time for time, _ in packets]
    guessed = container.format.name in WITHOUT_TIMES and stream.codec_context.has_b_frames
    if not pts or guessed or None in pts or len(set(pts)) < len(pts):
        return None
    order = {time: index for index, time in enumerate(sorted(pts))}
    stored = tuple(index for index, (_, key) in enumerate(packets) if key)
    keys = tuple(order[packets[index][0]] for index in stored)
    size = (stream.codec_context.width, stream.codec_context.height)
    return Packets(
        pts=tuple(order),
        keys=tuple(sorted(keys)),
        stored=stored,
        unit=float(stream.time_base),
        fps=float(stream.average_rate or 0),
        size=size,
        container=container.format.name,
        pixels=str(stream.codec_context.pix_fmt),
    )


def rate_of(times: tuple[float, ...]) -> float:
    """Return the frames per second from the times of all frames; 0 if it cannot be determined."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0
