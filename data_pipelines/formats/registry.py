"""DATASET_FORMATS: `data.train.*.format` → how a row of that kind becomes a sample."""

from __future__ import annotations

import base64
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipelines.rows import Blob, RowError, Rows, data_files, rows_class
from data_pipelines.rows.base import MAX_ROW
from data_pipelines.samples import Image, Message, Sample, Video
from mmdora.core.registry import Registry

MAX_PATH = 4096  # bytes: Linux's limit
Where = Mapping[str, Sequence[str | int]]  # a row is kept if each named field has one of the values


@dataclass(frozen=True)
class Place:
    """Where a row stands: what a format needs besides the row itself. `root` is the media folder, resolved."""

    id: str
    source: str
    root: str

    def image(self, value: Any) -> Image:
        """The picture that a row names or holds. Raises RowError."""
        return Image(*self._media(value))

    def video(self, value: Any) -> Video:
        return Video(*self._media(value))

    def _media(self, value: Any) -> tuple[Path, bytes | None]:
        if isinstance(value, str) and value.startswith("data:"):
            value = from_data_url(value)
        return (value.path, value.data) if isinstance(value, Blob) else (self.file(value), None)

    def file(self, value: Any) -> Path:
        """The file that a row names, inside the root. Raises RowError for addresses and for paths that leave the root;
        symbolic links are followed when the file is wanted (`check_links`), since a look at the disk a row is slow.
        Only a path that is not the root's by its letters is looked up at once: it may come in by a link."""
        if not isinstance(value, str) or not value or "\0" in value or printable(value) != value:
            raise RowError(f"a media path must be a non-empty string, found {shown(value)}")
        if (size := len(value.encode())) > MAX_PATH:
            raise RowError(
                f"a media path of {size:,} bytes, {shown(value)}; bytes are given as 'data:image/png;base64,…'"
            )
        if "://" in value:
            raise RowError(f"{shown(value)} is an address; download it and give the file's path", value)
        path = os.path.normpath(os.path.join(self.root, value))  # noqa: PTH118  # Path has no lexical way
        by_letters = path.startswith(self.root.rstrip(os.sep) + os.sep)
        if not by_letters and (path == self.root or not _folder_inside(str(Path(path).parent), self.root)):
            raise RowError(f"{shown(value)} leaves the media folder {self.root}", value)
        return Path(path)

    def sample(self, messages: Sequence[Message], category: Any = None, answers: Sequence[str] | None = None) -> Sample:
        label = None if category is None else printable(str(category))
        return Sample(self.id, tuple(messages), self.source, label, tuple(answers or ()))


class Format(ABC):
    """How rows of one kind become samples. Stateless: one object serves every file."""

    def files(self, path: Path, media: Path) -> list[Path]:
        """The files that hold the rows. Raises UserError where one is missing."""
        return data_files(path)

    def watched(self, files: list[Path], media: Path) -> list[Path]:
        """What the rows depend on: they are indexed anew when any of it changes."""
        return files

    def rows(self, files: list[Path], media: Path, folder: Path) -> Rows:
        """How those files are read; `folder` is the index's own."""
        return rows_class(files)(files, folder)

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        """Whether a row's keys are this format's, and no other's."""
        return False

    @abstractmethod
    def parse(self, row: Any, place: Place) -> Sample:
        """One row as a sample. Raises RowError that names the key at fault."""


DATASET_FORMATS: Registry[type[Format]] = Registry("dataset format")


def recognise(row: Any) -> str | None:
    """The format of a row by its keys, or None where that says nothing."""
    if isinstance(row, list):
        row = {"messages": row}
    fitting = (name for name, form in DATASET_FORMATS.items() if isinstance(row, dict) and form.fits(row))
    return next(fitting, None)


def check_links(sample: Sample, root: str) -> None:
    """Raise RowError for a media file that a symbolic link puts outside the root."""
    for part in sample.media():
        if part.data is None and not _inside(part.path, root):
            raise RowError(
                f"{shown(str(part.path), 250)} is a link that leaves the media folder {root}", str(part.path)
            )


def _inside(path: Path, root: str) -> bool:
    if not _folder_inside(str(path.parent), root):
        return False
    # os.path's, since Path's raises for a name that is too long.
    return not os.path.islink(path) or os.path.realpath(path).startswith(root.rstrip(os.sep) + os.sep)  # noqa: PTH114


@lru_cache(4096)
def _folder_inside(folder: str, root: str) -> bool:
    real = os.path.realpath(folder)
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def kept(row: Any, where: Where) -> bool:
    """Whether the row's fields have the values that `where` asks for; 3 and "3" are the same, and true and "True"."""
    return isinstance(row, dict) and all(_plain(row.get(k)) in map(_plain, values) for k, values in where.items())


def _plain(value: Any) -> str:
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


def from_data_url(url: str) -> Blob:
    """What a `data:image/png;base64,…` holds. Raises RowError."""
    if len(url) > MAX_ROW:
        raise RowError(f"a data URL of {len(url) >> 20} MiB; they may have {MAX_ROW >> 20}: give a file's path")
    head, _, text = url.partition(",")
    kind, _, coding = head.removeprefix("data:").partition(";")
    if coding.rpartition(";")[2] != "base64" or not text:
        raise RowError(f"a data URL must be 'data:image/png;base64,' and base64, found {shown(url)}")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise RowError(f"a data URL whose base64 cannot be read ({error}): {shown(url)}") from error
    return Blob(Path(f"data-url.{kind.rpartition('/')[2][:20]}"), data)


def shown(value: Any, most: int = 80) -> str:
    """A value of a row as a reason quotes it: short, whatever it is."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= most else text[:most] + "…"


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold (half a surrogate pair) written out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
