"""VIDEO_READERS: the registry of `data.video.reader`, functions that open a file and read selected frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmdora.core.registry import Registry


@dataclass(frozen=True)
class Timeline:
    """The frames of a file, known without decoding them."""

    times: tuple[float, ...]  # seconds since the first frame, in presentation order
    fps: float  # average frames per second; 0 if the file has no times
    keyframes: tuple[int, ...]  # indices of the frames that can be decoded alone
    size: tuple[int, int]  # width, height


@dataclass(frozen=True)
class SampledVideo:
    """Frames sampled from a video, and their positions in the file. A processor must not sample them again."""

    frames: NDArray[np.uint8]  # [frames, height, width, 3]
    indices: tuple[int, ...]  # of the frames in the file
    fps: float  # of the file on average, not of the sampled frames
    total_frames: int  # of the file
    reader: str = ""  # the reader that decoded it, also if `auto` selected it
    times: tuple[float, ...] = ()  # of the frames, in seconds since the first frame of the file
    duration: float | None = None  # of the file, in seconds

    @property
    def spacing(self) -> float:
        """The mean time between successive frames, in seconds; for a single frame that of the file."""
        if len(self.times) > 1 and self.times[-1] > self.times[0]:
            return (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        return 1 / self.fps


class VideoFile(Protocol):
    """An open file. Any exception of its methods is reported as a MediaError that names the file."""

    timeline: Timeline

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at `indices`, in that order, as upright RGB: uint8 [frames, height, width, 3]."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


VideoReader = Callable[[Path], VideoFile]

VIDEO_READERS: Registry[VideoReader] = Registry("video reader")
