"""The interface of row readers: files are scanned once from end to end, then any row is read by its number."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MAX_ROW = 64 * 2**20  # bytes of one row; a longer one is damage, such as a quote that is never closed


class RowError(ValueError):
    """A row that is not a valid sample. `media` is the file at fault, if any; `id` names a row without an id of its
    own."""

    def __init__(self, reason: str, media: str | None = None, id: str | None = None):
        super().__init__(reason)
        self.media, self.id = media, id


@dataclass(frozen=True)
class Blob:
    """A media file inside a row or a shard; `path` only names it. A scan of a shard does not read its bytes."""

    path: Path
    data: bytes = field(default=b"", repr=False)


class RowReader(ABC):
    """Reads the rows of files for one index.

    `folder` is the folder of the index, for files that random access needs. `arrays` hold the positions of the rows: a
    scan fills them, and the index restores them, memory-mapped. A reader keeps no open file that a fork would share,
    and can be pickled.
    """

    def __init__(self, files: list[Path], folder: Path):
        self.files, self.folder = files, folder
        self.arrays: dict[str, np.ndarray] = {}
        self.done = 0  # bytes scanned

    @abstractmethod
    def scan(self) -> Iterator[Any]:
        """Iterate over all rows in order, with a RowError in place of each row that cannot be read. Raises UserError
        for a file that cannot be read at all."""

    @abstractmethod
    def read(self, number: int) -> Any:
        """Read the row with a number, which the scan could read. Raises RowError or ValueError if the file has changed
        since."""


class RowDecoder:
    """Decodes JSON and also rejects what Python's decoder accepts: duplicate keys and numbers with too many digits.

    Such a row becomes a RowError instead of an exception, so that the rest of the list can be read.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def at(self, text: str, place: int) -> tuple[Any, int]:
        """Return the value that begins at `place`, and its end. Raises ValueError or RecursionError."""
        self.faults = []
        value, end = self._decoder.raw_decode(text, place)
        return (RowError(self.faults[0]) if self.faults else value), end

    def whole(self, data: bytes) -> Any:
        """Return the only value in `data`. Raises ValueError (including UnicodeDecodeError) or RecursionError."""
        self.faults = []
        value = self._decoder.decode(data.decode())
        return RowError(self.faults[0]) if self.faults else value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            keys = [key for key, _ in pairs]
            self.faults.append(f"duplicate key {next(k for k in keys if keys.count(k) > 1)[:80]!r}")
        return row

    def _integer(self, digits: str) -> int:
        if len(digits) > sys.int_info.default_max_str_digits:
            self.faults.append(f"a number of {len(digits)} digits")
            return 0
        return int(digits)
