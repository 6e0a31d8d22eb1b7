"""Read rows of Arrow tables, memory-mapped; Parquet, which has no random access to rows, is first converted to Arrow.

Both file formats of Arrow are supported: streams, as `datasets.save_to_disk` writes them, and files with a footer.
Source: https://arrow.apache.org/docs/format/Columnar.html
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.rows.base import Blob, RowError, RowReader

PARQUET_ROWS = 128  # per batch; small, because rows may hold images
SLICE = 64  # rows converted to Python objects at once


class ArrowReader(RowReader):
    """Rows of .arrow and .parquet files."""

    def __init__(self, files: list[Path], folder: Path):
        super().__init__(files, folder)
        self._batches: dict[int, list[Any]] = {}  # by file; each process opens its own

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
                    place += not parquet  # damaged parts of Parquet are not converted
                    continue
                starts.append(number)
                files.append(f)
                places.append(place)
                place += 1
                number += len(batch)
                for begin in range(0, len(batch), SLICE):
                    yield from self._convertible_rows(f, batch.slice(begin, SLICE), number - len(batch) + begin)
            self.done += file.stat().st_size
        self.arrays = {
            name: np.array(a, np.int64) for name, a in (("start", starts), ("file", files), ("place", places))
        }

    def read(self, number: int) -> Any:
        at = int(np.searchsorted(self.arrays["start"], number, "right")) - 1
        f, place = int(self.arrays["file"][at]), int(self.arrays["place"][at])
        batches = self._batches.get(f) or list(read_batches(self._arrow_file(f)))
        batch = batches[place] if place < len(batches) else RowError(f"{self._arrow_file(f)} has no batch {place}")
        if isinstance(batch, RowError):
            raise RowError(f"can no longer be read ({batch}); was the file changed, or the cache deleted, meanwhile?")
        self._batches[f] = batches
        (row,) = self._rows(f, batch.slice(number - int(self.arrays["start"][at]), 1), number)
        return row

    def _convertible_rows(self, f: int, batch: Any, number: int) -> list[Any]:
        """Return the rows of a batch, with a RowError for values that Python cannot represent, such as a date out of
        range or text that is not UTF-8."""
        try:
            return list(self._rows(f, batch, number))
        except (ValueError, OverflowError, KeyError) as error:
            if len(batch) == 1:
                return [RowError(f"cannot be read ({first_line(error)})", id=f"{self.files[f].name}/{number}")]
            return [row for i in range(len(batch)) for row in self._convertible_rows(f, batch.slice(i, 1), number + i)]

    def _rows(self, f: int, batch: Any, number: int) -> Iterator[dict[str, Any]]:
        for i, row in enumerate(batch.to_pylist()):
            yield {k: as_blobs(v, Path(self.files[f].name, f"{number + i}", k)) for k, v in row.items()}

    def _arrow_file(self, f: int) -> Path:
        return self.folder / f"{f:05d}.arrow" if self.files[f].suffix == ".parquet" else self.files[f]

    def _convert(self, f: int) -> Iterator[Any]:
        """Convert a Parquet file to Arrow in the folder of the index. Yields its readable batches."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with (
                parquet.ParquetFile(self.files[f]) as table,
                pa.OSFile(str(self._arrow_file(f)), "wb") as out,
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
    """Iterate over the record batches of a file without copying. Yields a RowError for a damaged batch, and stops there
    if the next one cannot be located."""
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
                batch.validate(full=True)  # the offsets of a damaged batch could point anywhere in memory
                yield batch
            except pa.ArrowInvalid as error:
                yield RowError(f"batch {place} is damaged ({first_line(error)})", where, f"{name}/batch-{place}")
            place += 1
    except StopIteration:
        return
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        yield RowError(f"the file is damaged ({first_line(error)})", where, name)


def as_blobs(value: Any, name: Path) -> Any:
    """Replace the files inside a value by Blobs: plain bytes, or `{bytes, path}` as `datasets.Image` stores them."""
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
    """Return the first line of an error's message, or its type if there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
