"""What a file of rows is: it is scanned once from end to end, and then any row is read by its number."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MAX_ROW = 64 * 2**20  # bytes of one row: what is longer is damage, a quote that never closes


class RowError(ValueError):
    """A row that is no sample; `media` is the path at fault, if one is. `id` names a row that has no other name."""

    def __init__(self, reason: str, media: str | None = None, id: str | None = None):
        super().__init__(reason)
        self.media, self.id = media, id


@dataclass(frozen=True)
class Blob:
    """A media file that lies inside a row or a shard; `path` only names it. A scan leaves its bytes unread."""

    path: Path
    data: bytes = field(default=b"", repr=False)


class Rows(ABC):
    """The rows of files, opened for one index.

    `folder` is the index's own: what must be written to reach rows at random goes there. `arrays` say where each row
    is: a scan fills them, and the index gives them back, mapped from its files. An object holds no open file that a
    fork would share, and can be pickled.
    """

    def __init__(self, files: list[Path], folder: Path):
        self.files, self.folder = files, folder
        self.arrays: dict[str, np.ndarray] = {}
        self.done = 0  # bytes scanned

    @abstractmethod
    def scan(self) -> Iterator[Any]:
        """Every row in order, and a RowError in the place of each that cannot be read. Raises UserError for a file that
        cannot be read at all."""

    @abstractmethod
    def read(self, number: int) -> Any:
        """The row of that number, which the scan could read. Raises RowError or ValueError where the file has changed
        since."""


class RowDecoder:
    """JSON values, and what Python's own reader lets pass without a word: a doubled key, a number without end.

    What is found is left in `faults` of the row, so that a list can be read on.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def at(self, text: str, place: int) -> tuple[Any, int]:
        """The value that begins at `place`, and where it ends. Raises ValueError or RecursionError."""
        self.faults = []
        value, end = self._decoder.raw_decode(text, place)
        return (RowError(self.faults[0]) if self.faults else value), end

    def whole(self, data: bytes) -> Any:
        """The one value in `data`. Raises ValueError (UnicodeDecodeError is one) or RecursionError."""
        self.faults = []
        value = self._decoder.decode(data.decode())
        return RowError(self.faults[0]) if self.faults else value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            self.faults.append(f"the key {next(k for k in keys if keys.count(k) > 1)[:80]!r} stands in it twice")
        return made

    def _integer(self, digits: str) -> int:
        if len(digits) > sys.int_info.default_max_str_digits:
            self.faults.append(f"a number of {len(digits)} digits")
            return 0
        return int(digits)
