"""Small media files for the tests."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A smooth coloured picture of `size` (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    picture(seed, size).save(path)
    return path


def write_video(path: Path, frames: int = 12, size: tuple[int, int] = (64, 48), codec: str = "libx264") -> Path:
    """A clip whose frames differ: frame i is picture(i)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=6)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture(i, size)), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
