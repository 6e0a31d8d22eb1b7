"""The frames of a file from its packets, without decoding them: how many, when, and which stand alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from data_pipelines.video.registry import Timeline

if TYPE_CHECKING:
    from av.container import InputContainer

# Containers that keep no time of showing: FFmpeg guesses it, wrongly where frames are not stored in the order shown.
WITHOUT_TIMES = {"avi", "h264", "hevc", "m4v", "mpegvideo"}
# Containers in which a seek lands on the keyframe it asks for. In others (MPEG streams, WMV) it may land anywhere, and
# what is decoded from there be another picture.
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"}
# What FFmpeg 4, which decord carries, TorchCodec and PyAV turn into the very same RGB, if its sides are even.
SAME_COLOURS = {"yuv420p", "yuvj420p"}


@dataclass(frozen=True)
class Packets:
    """A stream's packets. Times are in units of the stream's time base, in the order shown."""

    pts: tuple[int, ...]
    keys: tuple[int, ...]  # indices, in the order shown
    stored: tuple[int, ...]  # the keyframes' places in the order stored
    unit: float  # seconds
    fps: float
    size: tuple[int, int]  # width, height
    container: str
    pixels: str  # the pixel format

    @property
    def seekable(self) -> bool:
        """Whether a seek to a keyframe lands on it."""
        return self.container in SEEKABLE

    @property
    def same_colours(self) -> bool:
        """Whether every reader turns the pixels into the same RGB."""
        return self.pixels in SAME_COLOURS and self.size[0] % 2 == self.size[1] % 2 == 0

    @cached_property
    def timeline(self) -> Timeline:
        times = tuple((pts - self.pts[0]) * self.unit for pts in self.pts)
        return Timeline(times, self.fps or rate_of(times), self.keys, self.size)

    def decord_trouble(self) -> str | None:
        """Why decord 0.6 would give other frames than those asked for, if it would (tests/test_video.py shows each).

        It counts from keyframes in the order stored, and trusts every seek.
        """
        if not self.seekable:
            return f"seeks in {self.container} are not exact"
        if self.stored != self.keys:
            return "its keyframes are shown later than stored"
        if not self.same_colours:
            return f"its pixels, {self.pixels} of {self.size[0]}×{self.size[1]}, are not turned into RGB exactly"
        return None


def read_packets(container: InputContainer, stream: Any) -> Packets | None:
    """The packets of a video stream, by one pass over the file; None where they do not tell when each frame is shown.

    Leaves the container at its end.
    """
    shown = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            shown.append((packet.pts, packet.is_keyframe))
    pts = [time for time, _ in shown]
    guessed = container.format.name in WITHOUT_TIMES and stream.codec_context.has_b_frames
    if not pts or guessed or None in pts or len(set(pts)) < len(pts):
        return None
    place = {time: index for index, time in enumerate(sorted(pts))}
    stored = tuple(index for index, (_, key) in enumerate(shown) if key)
    keys = tuple(place[shown[index][0]] for index in stored)
    size = (stream.codec_context.width, stream.codec_context.height)
    return Packets(
        pts=tuple(place),
        keys=tuple(sorted(keys)),
        stored=stored,
        unit=float(stream.time_base),
        fps=float(stream.average_rate or 0),
        size=size,
        container=container.format.name,
        pixels=str(stream.codec_context.pix_fmt),
    )


def rate_of(times: tuple[float, ...]) -> float:
    """Frames a second from the times of all; 0 where these do not tell."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0
