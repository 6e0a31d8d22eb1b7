"""A directory of images as a video, in natural order: frame_2.jpg comes before frame_10.jpg."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.samples import MediaError
from data_pipelines.video.registry import VIDEO_READERS, Timeline


@VIDEO_READERS.register("frames")
def open_frames(path: Path) -> FramesFile:
    """A directory of images of one size, in natural order; `data.video.frames_fps` images per second."""
    return FramesFile(path)


class FramesFile:
    """The images of a directory. PIL is imported here, so that the registry is available without it."""

    def __init__(self, path: Path):
        from PIL import Image

        from data_pipelines.images import load_image

        self.path, self._load_image = path, load_image
        suffixes = Image.registered_extensions()
        images = (p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
        self._files = sorted(images, key=natural_key)
        if not self._files:
            raise MediaError(path, "the directory has no images")
        size = load_image(self._files[0]).size
        indices = range(len(self._files))
        self.timeline = Timeline(tuple(map(float, indices)), 0.0, tuple(indices), size)

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return frames, uint8 [len(indices), height, width, 3]. Raises MediaError that names the image at fault."""
        images = {index: self._load_image(self._files[index]) for index in set(indices)}
        for index, image in images.items():
            if image.size != self.timeline.size:
                width, height = self.timeline.size
                reason = f"{image.width}×{image.height} pixels, but the first image has {width}×{height}"
                raise MediaError(self._files[index], reason)
        return np.stack([np.asarray(images[index]) for index in indices])

    def close(self) -> None:
        """Do nothing: no file is open."""


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that orders the numbers in a name by value."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", path.name)]
