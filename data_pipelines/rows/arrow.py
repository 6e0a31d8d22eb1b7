"""Rows of Arrow tables, mapped from disk; Parquet, which cannot be read row by row, is first written out as Arrow.

Both of Arrow's file forms are read: the stream that `datasets.save_to_disk` writes, and the one with a footer.
Source: https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.rows.base import Blob, RowError, Rows

PARQUET_ROWS = 128  # of a batch: some may hold pictures
SLICE = 64  # rows that become Python objects at once


class ArrowRows(Rows):
    def __init__(self, files: list[Path], folder: Path):
        super().__init__(files, folder)
        self._batches: dict[int, list[Any]] = {}  # by file; opened by each process for itself

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batches": {}}

    def scan(self) -> Iterator[Any]:
        starts, files, places = array("q"), array("q"), array("q")
        number = 0
        for f, file in enumerate(self.files):
            parquet, place = file.suffix == ".parquet", 0
            for batch in self._convert(f) if parquet else read_batches(file):
                if isinstance(batch, RowError):
                    yield batch
                    number += 1
                    place += not parquet  # what is damaged in Parquet is not written out
                    continue
                starts.append(number)
                files.append(f)
                places.append(place)
                place += 1
                number += len(batch)
                for begin in range(0, len(batch), SLICE):
                    yield from self._tried(f, batch.slice(begin, SLICE), number - len(batch) + begin)
            self.done += file.stat().st_size
        self.arrays = {
            name: np.array(a, np.int64) for name, a in (("start", starts), ("file", files), ("place", places))
        }

    def read(self, number: int) -> Any:
        at = int(np.searchsorted(self.arrays["start"], number, "right")) - 1
        f, place = int(self.arrays["file"][at]), int(self.arrays["place"][at])
        batches = self._batches.get(f) or list(read_batches(self._mapped(f)))
        batch = batches[place] if place < len(batches) else RowError(f"{self._mapped(f)} has no batch {place}")
        if isinstance(batch, RowError):
            raise RowError(f"cannot be read any more ({batch}); was the file changed, or the cache deleted, meanwhile?")
        self._batches[f] = batches
        (row,) = self._rows(f, batch.slice(number - int(self.arrays["start"][at]), 1), number)
        return row

    def _tried(self, f: int, batch: Any, number: int) -> list[Any]:
        """The batch's rows, with a RowError for what Python has no value for: a date out of range, a name not UTF-8."""
        try:
            return list(self._rows(f, batch, number))
        except (ValueError, OverflowError, KeyError) as error:
            if len(batch) == 1:
                return [RowError(f"cannot be read ({first_line(error)})", id=f"{self.files[f].name}/{number}")]
            return [row for i in range(len(batch)) for row in self._tried(f, batch.slice(i, 1), number + i)]

    def _rows(self, f: int, batch: Any, number: int) -> Iterator[dict[str, Any]]:
        for i, row in enumerate(batch.to_pylist()):
            yield {k: as_blobs(v, Path(self.files[f].name, f"{number + i}", k)) for k, v in row.items()}

    def _mapped(self, f: int) -> Path:
        return self.folder / f"{f:05d}.arrow" if self.files[f].suffix == ".parquet" else self.files[f]

    def _convert(self, f: int) -> Iterator[Any]:
        """Write a Parquet file as Arrow into the index's folder; its batches, as far as they can be read."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with (
                parquet.ParquetFile(self.files[f]) as table,
                pa.OSFile(str(self._mapped(f)), "wb") as out,
                pa.ipc.new_stream(out, table.schema_arrow) as writer,
            ):
                for group in range(table.num_row_groups):
                    yield from self._group(f, table, group, writer)
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            yield RowError(f"the file is damaged ({first_line(error)})", str(self.files[f]), self.files[f].name)

    def _group(self, f: int, table: Any, group: int, writer: Any) -> Iterator[Any]:
        import pyarrow as pa

        try:
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], use_threads=False):
                batch.validate(full=True)
                writer.write_batch(batch)
                yield batch
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            file = self.files[f]
            yield RowError(f"row group {group} is damaged ({first_line(error)})", str(file), f"{file.name}/{group}")


def read_batches(file: Path) -> Iterator[Any]:
    """The record batches of a file without copying; a RowError in the place of one that is damaged, and after it, where
    the next cannot be found, nothing."""
    import pyarrow as pa

    name, where = file.name, str(file)
    try:
        mapped = pa.memory_map(where)
        head = mapped.read(6)
        mapped.seek(0)
        footer = head == b"ARROW1"
        reader = pa.ipc.open_file(mapped) if footer else pa.ipc.open_stream(mapped)
        place = 0
        while not footer or place < reader.num_record_batches:
            batch = reader.get_batch(place) if footer else reader.read_next_batch()
            try:
                batch.validate(full=True)  # offsets of damaged batches would lead anywhere in memory
                yield batch
            except pa.ArrowInvalid as error:
                yield RowError(f"batch {place} is damaged ({first_line(error)})", where, f"{name}/batch-{place}")
            place += 1
    except StopIteration:
        return
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        yield RowError(f"the file is damaged ({first_line(error)})", where, name)


def as_blobs(value: Any, name: Path) -> Any:
    """The value with each file inside it as a Blob: bytes alone, or `{bytes, path}`, as `datasets.Image` keeps them."""
    if isinstance(value, bytes):
        return Blob(name, value)
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        inner = value["path"]
        if value["bytes"] is None:
            return inner
        return Blob(name / Path(inner).name if isinstance(inner, str) and inner else name, value["bytes"])
    if isinstance(value, list):
        return [as_blobs(v, name / str(i)) for i, v in enumerate(value)]
    return value


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
