"""VIDEO_READERS: `data.video.reader` → a function that decodes chosen frames of one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmdora.registry import Registry


@dataclass(frozen=True)
class VideoClip:
    """Sampled frames, uint8 [num_frames, height, width, 3], and where in the file they stood."""

    frames: NDArray[np.uint8]
    indices: tuple[int, ...]
    fps: float
    total_frames: int


VideoReader = Callable[[Path, int], VideoClip]

VIDEO_READERS: Registry[VideoReader] = Registry("video reader")
