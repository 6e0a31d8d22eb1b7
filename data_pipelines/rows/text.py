"""Read rows of text files (JSON, JSON lines, CSV, TSV), indexed by the byte offsets where they begin and end."""

from __future__ import annotations

import codecs
import csv
import io
import re
from abc import abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.rows.base import MAX_ROW, RowDecoder, RowError, RowReader
from mmdora.core.errors import UserError

SPACE = re.compile(r"[ \t\n\r]*")
NOT_UTF8 = re.compile(r"[\udc80-\udcff]")  # characters that "surrogateescape" puts in place of invalid bytes
CHUNK = 2**22  # bytes
NEAR_END = 16  # characters; the error in a truncated value is at most this far from the cut

csv.field_size_limit(MAX_ROW)  # the default is 128 KiB, and a field may hold an image


class TextReader(RowReader):
    """Rows that are consecutive byte ranges of one file."""

    def scan(self) -> Iterator[Any]:
        begins, ends = array("q"), array("q")
        for begin, end, row in self._iterate():
            begins.append(begin)
            ends.append(end)
            self.done = end
            yield row
        self.arrays = {"begin": np.array(begins, np.int64), "end": np.array(ends, np.int64)}

    def read(self, number: int) -> Any:
        # Opened for each row, which takes about 10 µs: forked processes must not share a file position.
        with self.files[0].open("rb", buffering=0) as file:
            file.seek(int(self.arrays["begin"][number]))
            row = self._parse(file.read(int(self.arrays["end"][number] - self.arrays["begin"][number])))
        if isinstance(row, RowError):
            raise row
        return row

    @abstractmethod
    def _iterate(self) -> Iterator[tuple[int, int, Any]]:
        """Iterate over (begin, end, row or RowError); offsets are in bytes."""

    @abstractmethod
    def _parse(self, data: bytes) -> Any: ...


class JsonLinesReader(TextReader):
    """One JSON value per line."""

    def __init__(self, files: list[Path], folder: Path):
        super().__init__(files, folder)
        self._decoder = RowDecoder()

    def _iterate(self) -> Iterator[tuple[int, int, Any]]:
        with self.files[0].open("rb") as file:
            end = skip_bom(file)
            number = 0
            while line := file.readline(MAX_ROW):
                number += 1
                begin, end = end, end + len(line)
                if not line.strip():
                    continue
                try:
                    yield begin, end, self._parse(line)
                except (ValueError, RecursionError) as error:
                    reason = f"line {number} is not valid JSON ({error})"
                    yield begin, end, RowError(reason, id=f"line-{number}")

    def _parse(self, data: bytes) -> Any:
        return self._decoder.whole(data)


class JsonListReader(TextReader):
    """A JSON list, read in chunks: a file of any size takes the memory of one chunk."""

    def __init__(self, files: list[Path], folder: Path):
        super().__init__(files, folder)
        self._decoder = RowDecoder()

    def _parse(self, data: bytes) -> Any:
        return self._decoder.whole(data)

    def _iterate(self) -> Iterator[tuple[int, int, Any]]:
        with self.files[0].open("rb") as file:
            window = Window(self.files[0], file)
            if window.next() != "[":
                name = type(window.value(self._decoder)).__name__
                reason = f"expected a JSON list of samples, not {name}; a file with one row per line must end in .jsonl"
                raise UserError(f"{self.files[0]}: {reason}")
            window.advance(window.at + 1)
            closing = window.next() == "]"
            while not closing:
                window.next()
                begin = window.byte
                row = window.value(self._decoder)
                yield begin, window.byte, row
                mark = window.next()
                if mark not in (",", "]"):
                    raise window.error("expected ',' or ']'" if mark else "the list is not closed")
                closing = mark == "]"
                if not closing:
                    window.advance(window.at + 1)
            window.advance(window.at + 1)
            if window.next():
                raise window.error("text after the end of the list")


class Window:
    """A chunk of a UTF-8 file as text, with a position: `at` in its characters, `byte` in bytes of the file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.byte = self.read_to = skip_bom(file)
        self.text, self.at, self.ended = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def next(self) -> str:
        """Skip white space. Returns the next character, or "" at the end of the file."""
        while True:
            self.advance(SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]  # it matches the empty string too
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def advance(self, to: int) -> None:
        """Move to a position in the chunk."""
        self.byte += to - self.at if self.text.isascii() else len(self.text[self.at : to].encode())
        self.at = to

    def more(self) -> None:
        """Read more text; the chunk doubles if a single row fills it. Raises UserError if the text is not UTF-8."""
        if self.at == 0 and len(self.text) > MAX_ROW:
            raise self.error(f"a row of more than {MAX_ROW >> 20} MiB, perhaps an unclosed quote or bracket")
        data = self.file.read(max(CHUNK, len(self.text) - self.at))
        pending = len(self._decoder.getstate()[0])
        try:
            self.text, self.at = self.text[self.at :] + self._decoder.decode(data, final=not data), 0
        except UnicodeDecodeError as error:
            place = self.read_to - pending + error.start
            raise UserError(f"{self.path}: not UTF-8 text ({error.reason} at byte {place})") from error
        self.read_to += len(data)
        self.ended = not data

    def value(self, decoder: RowDecoder) -> Any:
        """Return the JSON value at the position, and move behind it. Raises UserError with the line and the byte."""
        while True:
            try:
                value, end = decoder.at(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number at the end of the chunk may be incomplete
                    self.advance(end)
                    return value
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            except ValueError as error:
                message, place = getattr(error, "msg", str(error)), getattr(error, "pos", self.at)
                cut = message.startswith("Unterminated string") or place >= len(self.text) - NEAR_END
                if self.ended or not cut:
                    self.advance(place)
                    raise self.error(message) from error
            self.more()

    def error(self, reason: str) -> UserError:
        """Return the error for the position, with its line and byte."""
        lines, remaining = 1, self.byte
        with self.path.open("rb") as file:
            while remaining > 0 and (data := file.read(min(CHUNK, remaining))):
                lines, remaining = lines + data.count(b"\n"), remaining - len(data)
        return UserError(f"{self.path}: not valid JSON ({reason}: line {lines}, byte {self.byte})")


class TableReader(TextReader):
    """CSV, or TSV by its suffix. The first line names the columns; a quoted field may contain line breaks."""

    def __init__(self, files: list[Path], folder: Path):
        super().__init__(files, folder)
        self.delimiter = "\t" if files[0].suffix.lower() == ".tsv" else ","
        self._columns: list[str] = []

    def _iterate(self) -> Iterator[tuple[int, int, Any]]:
        with self.files[0].open("rb") as file:
            at = skip_bom(file)
            taken = [at]

            def lines() -> Iterator[str]:
                while line := file.readline(MAX_ROW):
                    taken[0] += len(line)
                    yield line.decode("utf-8", "surrogateescape")

            reader = csv.reader(lines(), delimiter=self.delimiter, strict=True)
            while True:
                begin = taken[0]
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield begin, taken[0], RowError(f"line {reader.line_num} is not valid CSV ({error})")
                    continue
                if not self._columns:
                    self._columns = self._header(fields)
                elif fields:
                    yield begin, taken[0], self._row(fields)

    def _parse(self, data: bytes) -> Any:
        if not self._columns:
            with self.files[0].open("rb") as file:
                skip_bom(file)
                lines = (line.decode("utf-8", "surrogateescape") for line in file)
                self._columns = self._header(next(csv.reader(lines, delimiter=self.delimiter)))
        text = data.decode("utf-8", "surrogateescape")
        return self._row(next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter, strict=True)))

    def _header(self, fields: list[str]) -> list[str]:
        if doubled := sorted({f for f in fields if fields.count(f) > 1}):
            raise UserError(f"{self.files[0]}: two columns have the name {doubled[0]!r}")
        return fields

    def _row(self, fields: list[str]) -> Any:
        if len(fields) != len(self._columns):
            return RowError(f"has {len(fields)} fields, but the header has {len(self._columns)}")
        if any(not field.isascii() and NOT_UTF8.search(field) for field in fields):
            return RowError("is not UTF-8 text")
        return dict(zip(self._columns, fields, strict=True))


def skip_bom(file: BinaryIO) -> int:
    """Skip a byte-order mark. Returns the offset of the text."""
    begin = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    file.seek(begin)
    return begin
