"""Video readers, one file each; importing the package registers them all. `load_video` is the way in."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from data_pipelines.samples import MediaError
from data_pipelines.video import decord_reader, pyav_reader
from data_pipelines.video.registry import VIDEO_READERS, VideoClip

__all__ = ["VIDEO_READERS", "VideoClip", "decord_reader", "load_video", "pyav_reader", "resolve_reader"]


def resolve_reader(name: str) -> str:
    """`auto` as the reader it stands for here: decord where it is installed, else PyAV. Receipts record the answer."""
    if name != "auto":
        VIDEO_READERS[name]  # an unknown name is an error, with the nearest known one
        return name
    return "decord" if importlib.util.find_spec("decord") else "pyav"


def load_video(path: Path, num_frames: int, reader: str = "auto") -> VideoClip:
    """`num_frames` frames at equal steps over the file. Raises MediaError that names the file and says why."""
    if not path.is_file():
        raise MediaError(path, "no such file")
    if path.stat().st_size == 0:
        raise MediaError(path, "the file is empty")
    return VIDEO_READERS[resolve_reader(reader)](path, num_frames)
