"""VIDEO_READERS: `data.video.reader` → what opens one file, tells its frames and fetches chosen ones."""

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
    """What a file says of its frames without decoding them."""

    times: tuple[float, ...]  # seconds from the first frame to each, in the order in which they are shown
    fps: float  # frames a second on average; 0: the file has no clock
    keyframes: tuple[int, ...]  # indices of the frames that need no other
    size: tuple[int, int]  # width, height


@dataclass(frozen=True)
class VideoClip:
    """Sampled frames, uint8 [frames, height, width, 3], and where in the file they stood: a processor that gets these
    must not sample again."""

    frames: NDArray[np.uint8]
    indices: tuple[int, ...]
    fps: float  # of the file, not of the sample
    total_frames: int
    reader: str = ""  # the one that decoded it, where `auto` chose

    @property
    def duration(self) -> float | None:
        """Seconds of the whole file, or None where it has no clock."""
        return self.total_frames / self.fps if self.fps else None


class VideoFile(Protocol):
    """An open file. Whatever its methods raise becomes a MediaError that names the file."""

    timeline: Timeline

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """The frames at `indices`, in that order, upright RGB: uint8 [frames, height, width, 3]."""
        ...

    def close(self) -> None: ...


VideoReader = Callable[[Path], VideoFile]

VIDEO_READERS: Registry[VideoReader] = Registry("video reader")
