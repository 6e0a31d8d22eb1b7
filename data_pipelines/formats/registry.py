"""DATASET_FORMATS: the registry of `data.train.*.format`, the classes that convert rows to samples."""

from __future__ import annotations

import base64
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipelines.rows import Blob, RowError, RowReader, data_files, reader_class
from data_pipelines.rows.base import MAX_ROW
from data_pipelines.samples import Image, Message, Sample, Video
from mmdora.core.registry import Registry

MAX_PATH = 4096  # bytes; the limit of Linux
Where = Mapping[str, Sequence[str | int]]  # a row is selected if each field has one of the values


@dataclass(frozen=True)
class Place:
    """The inputs of a format besides the row itself: the row's id, its file and the media folder."""

    id: str
    source: str
    root: str  # resolved

    def image(self, value: Any) -> Image:
        """Return the image that a row names or holds: a path, a data URL or embedded bytes. Raises RowError."""
        return Image(*self._media(value))

    def video(self, value: Any) -> Video:
        """Return the video that a row names or holds. Raises RowError."""
        return Video(*self._media(value))

    def _media(self, value: Any) -> tuple[Path, bytes | None]:
        if isinstance(value, str) and value.startswith("data:"):
            value = from_data_url(value)
        return (value.path, value.data) if isinstance(value, Blob) else (self.file(value), None)

    def file(self, value: Any) -> Path:
        """Return the file that a row names, inside the root; `file://` before a path is ignored. Raises RowError for
        other URLs and for paths outside the root.

        Symbolic links are resolved when the sample is accessed (`check_links`), because a disk access per row is slow.
        Only a path that does not begin with the root is resolved at once, since a link may lead into the root.
        """
        value = value.removeprefix("file://") if isinstance(value, str) else value
        if not isinstance(value, str) or not value or "\0" in value or printable(value) != value:
            raise RowError(f"a media path must be a non-empty string, not {shown(value)}")
        if (size := len(value.encode())) > MAX_PATH:
            raise RowError(f"a media path of {size:,} bytes, {shown(value)}; embed bytes as 'data:image/png;base64,…'")
        if "://" in value:
            raise RowError(f"{shown(value)} is a URL; download the file and use its path", value)
        path = os.path.normpath(os.path.join(self.root, value))  # noqa: PTH118  # Path cannot normalize without disk access
        begins_with_root = path.startswith(self.root.rstrip(os.sep) + os.sep)
        if not begins_with_root and (path == self.root or not _folder_inside(str(Path(path).parent), self.root)):
            raise RowError(f"{shown(value)} is outside the media folder {self.root}", value)
        return Path(path)

    def sample(self, messages: Sequence[Message], category: Any = None, answers: Sequence[str] | None = None) -> Sample:
        """Return the sample of the row."""
        label = None if category is None else printable(str(category))
        return Sample(self.id, tuple(messages), self.source, label, tuple(answers or ()))


class Format(ABC):
    """Converts rows of one dataset format to samples. Stateless; subclasses must define `parse`."""

    def files(self, path: Path, media: Path) -> list[Path]:
        """Return the files that hold the rows. Raises UserError if one is missing."""
        return data_files(path)

    def dependencies(self, files: list[Path], media: Path) -> list[Path]:
        """Return the files and folders that the rows depend on. If one of them changes, the index is rebuilt."""
        return files

    def reader(self, files: list[Path], media: Path, folder: Path) -> RowReader:
        """Return a reader of the files. `folder` is the folder of the index."""
        return reader_class(files)(files, folder)

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        """Return whether a row's keys are those of this format and of no other."""
        return False

    @abstractmethod
    def parse(self, row: Any, place: Place) -> Sample:
        """Convert one row to a sample. Raises RowError that names the key at fault."""


DATASET_FORMATS: Registry[type[Format]] = Registry("dataset format")


def guess_row_format(row: Any) -> str | None:
    """Return the name of the format that fits a row's keys, or None."""
    if isinstance(row, list):
        row = {"messages": row}
    return next((name for name, cls in DATASET_FORMATS.items() if isinstance(row, dict) and cls.fits(row)), None)


def check_links(sample: Sample, root: str) -> None:
    """Raise RowError for a media file that is outside the root because of a symbolic link."""
    for part in sample.media():
        if part.data is None and not _inside(part.path, root):
            raise RowError(
                f"{shown(str(part.path), 250)} is a link to a file outside the media folder {root}", str(part.path)
            )


def _inside(path: Path, root: str) -> bool:
    if not _folder_inside(str(path.parent), root):
        return False
    # os.path, because Path.is_symlink raises for a name that is too long.
    return not os.path.islink(path) or os.path.realpath(path).startswith(root.rstrip(os.sep) + os.sep)  # noqa: PTH114


@lru_cache(4096)
def _folder_inside(folder: str, root: str) -> bool:
    real = os.path.realpath(folder)
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def matches(row: Any, where: Where) -> bool:
    """Return whether the row's fields have values that `where` lists. 3 equals "3", and true equals "True"."""
    return isinstance(row, dict) and all(_as_text(row.get(k)) in map(_as_text, values) for k, values in where.items())


def _as_text(value: Any) -> str:
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


def from_data_url(url: str) -> Blob:
    """Decode a URL such as `data:image/png;base64,…`. Raises RowError."""
    if len(url) > MAX_ROW:
        raise RowError(f"a data URL of {len(url) >> 20} MiB; the limit is {MAX_ROW >> 20}: use a file and its path")
    head, _, text = url.partition(",")
    kind, _, coding = head.removeprefix("data:").partition(";")
    if coding.rpartition(";")[2] != "base64" or not text:
        raise RowError(f"a data URL must begin with 'data:image/png;base64,' and have content, not {shown(url)}")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise RowError(f"a data URL with invalid base64 ({error}): {shown(url)}") from error
    return Blob(Path(f"data-url.{kind.rpartition('/')[2][:20]}"), data)


def shown(value: Any, limit: int = 80) -> str:
    """Return a value as error messages quote it, with at most `limit` characters."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"


def printable(text: str) -> str:
    """Escape characters that UTF-8 cannot encode, such as half of a surrogate pair."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
