"""Video readers, one file each, and `load_video`. Importing the package registers all readers without their libraries:
torch, PyAV, decord, TorchCodec and PIL are imported when a reader opens a file."""

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
from data_pipelines.video.isolation import AVAILABLE, decode_in_child
from data_pipelines.video.registry import VIDEO_READERS, SampledVideo
from data_pipelines.video.sampling import Sampling
from mmdora.core.errors import UserError

if TYPE_CHECKING:  # the decoding process imports this package and must start quickly, without pydantic
    from mmdora.core.config import VideoConfig

__all__ = [
    "VIDEO_READERS",
    "SampledVideo",
    "decord_reader",
    "frames_reader",
    "load_video",
    "pyav_reader",
    "resolve_reader",
    "torchcodec_reader",
]

PACKAGES = {"decord": "decord", "torchcodec": "torchcodec"}  # packages that are not installed everywhere


def resolve_reader(name: str) -> str:
    """Return the reader of video files that `name` stands for; receipts record it. `auto` is PyAV, which reads every
    format exactly and is faster than decord (benchmarks/data.py).

    Raises UserError if the name is unknown or its package is not installed.
    """
    if name == "auto":
        return "pyav"
    VIDEO_READERS[name]  # raises for an unknown name
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"data.video.reader: {name} is not installed; pip install {package}, or use auto")
    return name


def load_video(path: Path, config: VideoConfig, data: bytes | None = None) -> SampledVideo:
    """Load the frames of a video that `config` selects. If `data` holds the file's bytes, `path` only names it.

    `auto` reads a directory as `frames`. Decoding runs in a separate process, for at most `config.timeout` seconds.
    Raises MediaError that names the file and the reason.
    """
    if data is None:
        return _load(path, _reader(path, config.reader), config)
    if not data:
        raise MediaError(path, "the file is empty")
    with tempfile.TemporaryDirectory(prefix="mmdora-") as folder:  # all readers can seek in a file
        file = Path(folder, f"video{path.suffix}")
        file.write_bytes(data)
        try:
            return _load(file, resolve_reader(config.reader), config)
        except MediaError as error:
            raise MediaError(path, error.reason) from error


def _load(path: Path, reader: str, config: VideoConfig) -> SampledVideo:
    names = [field.name for field in dataclasses.fields(Sampling)]
    sampling = Sampling(**{name: getattr(config, name) for name in names})
    if config.timeout is None or not AVAILABLE:
        video = decode(path, reader, sampling)
        # torch warns about arrays that are not writable
        return dataclasses.replace(video, frames=np.require(video.frames, requirements="W"))
    return decode_in_child(path, reader, sampling, config.timeout)


def _reader(path: Path, name: str) -> str:
    """Return the reader for a file or directory. Raises MediaError if there is nothing to read."""
    if is_directory(path):
        if name not in ("auto", "frames"):
            raise MediaError(path, f"is a directory, which data.video.reader={name} cannot read; use auto or frames")
        return "frames"
    if name == "frames":
        raise MediaError(path, "is not a directory; data.video.reader=frames reads a directory of images")
    check_regular(path)
    return resolve_reader(name)
