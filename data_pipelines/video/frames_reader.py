"""A directory of pictures as a video: frame_2.jpg stands before frame_10.jpg."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.images import load_image
from data_pipelines.samples import MediaError
from data_pipelines.video.registry import VIDEO_READERS, Timeline


@VIDEO_READERS.register("frames")
def open_frames(path: Path) -> FramesFile:
    """The pictures of a directory in natural order, all of one size; `data.video.frames_fps` of them a second."""
    return FramesFile(path)


class FramesFile:
    def __init__(self, path: Path):
        self.path = path
        suffixes = Image.registered_extensions()
        found = (p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
        self._pictures = sorted(found, key=natural)
        if not self._pictures:
            raise MediaError(path, "the directory holds no pictures")
        size = load_image(self._pictures[0]).size
        every = range(len(self._pictures))
        self.timeline = Timeline(tuple(map(float, every)), 0.0, tuple(every), size)

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 [len(indices), height, width, 3]. Raises MediaError that names the picture at fault."""
        pictures = {index: load_image(self._pictures[index]) for index in set(indices)}
        for index, picture in pictures.items():
            if picture.size != self.timeline.size:
                width, height = self.timeline.size
                reason = (
                    f"{picture.width}×{picture.height} pixels, where the first of its directory has {width}×{height}"
                )
                raise MediaError(self._pictures[index], reason)
        return np.stack([np.asarray(pictures[index]) for index in indices])

    def close(self) -> None:
        """Nothing is held open."""


def natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts numbers in a name by their value."""
    return [(int(step), "") if step.isdecimal() else (-1, step) for step in re.split(r"(\d+)", path.name)]
