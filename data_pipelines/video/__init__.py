"""Video readers, one file each; importing the package registers them all. `load_video` is the way in."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.mediafiles import check_regular, is_directory
from data_pipelines.samples import MediaError
from data_pipelines.video import decord_reader, frames_reader, pyav_reader, torchcodec_reader
from data_pipelines.video.decoding import decode
from data_pipelines.video.isolation import AVAILABLE, decode_apart
from data_pipelines.video.registry import VIDEO_READERS, VideoClip
from data_pipelines.video.sampling import Sampling
from mmdora.core.errors import UserError

if TYPE_CHECKING:  # the decoding process imports this package, and is to start quickly
    from mmdora.core.config import VideoConfig

__all__ = [
    "VIDEO_READERS",
    "VideoClip",
    "decord_reader",
    "frames_reader",
    "load_video",
    "pyav_reader",
    "resolve_reader",
    "torchcodec_reader",
]

PACKAGES = {"decord": "decord", "torchcodec": "torchcodec"}  # what a reader needs that not every machine has


def resolve_reader(name: str) -> str:
    """The reader of files that `name` stands for: `auto` is PyAV, which reads every format exactly, and sooner than
    decord does (benchmarks/data.py). Receipts record the answer.

    Raises UserError for a name that is unknown or whose package is not installed.
    """
    if name == "auto":
        return "pyav"
    VIDEO_READERS[name]  # an unknown name is an error, with the nearest known one
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"data.video.reader: {name} is not installed here; pip install {package}, or take auto")
    return name


def load_video(path: Path, config: VideoConfig, data: bytes | None = None) -> VideoClip:
    """The frames of a video that `config` asks for. `data` holds the file's bytes where it lies in a shard; `path`
    then only names it.

    `auto` reads a directory as `frames`. Decoding has `config.timeout` seconds, in a process of its own. Raises
    MediaError that names the file and says why.
    """
    if data is None:
        return _load(path, _reader(path, config.reader), config)
    if not data:
        raise MediaError(path, "the file is empty")
    with tempfile.TemporaryDirectory(prefix="mmdora-") as folder:  # every reader can seek in a file
        file = Path(folder, f"video{path.suffix}")
        file.write_bytes(data)
        try:
            return _load(file, resolve_reader(config.reader), config)
        except MediaError as error:
            raise MediaError(path, error.reason) from error


def _load(path: Path, reader: str, config: VideoConfig) -> VideoClip:
    names = [field.name for field in dataclasses.fields(Sampling)]
    wanted = Sampling(**{name: getattr(config, name) for name in names})
    if config.timeout is None or not AVAILABLE:
        clip = decode(path, reader, wanted)
        return dataclasses.replace(clip, frames=np.require(clip.frames, requirements="W"))  # torch warns of the others
    return decode_apart(path, reader, wanted, config.timeout)


def _reader(path: Path, name: str) -> str:
    """The reader of what lies at `path`. Raises MediaError where that is nothing to read."""
    if is_directory(path):
        if name not in ("auto", "frames"):
            raise MediaError(path, f"is a directory, which data.video.reader {name} does not read; auto or frames do")
        return "frames"
    if name == "frames":
        raise MediaError(path, "is no directory, and data.video.reader frames reads the pictures of one")
    check_regular(path)
    return resolve_reader(name)
