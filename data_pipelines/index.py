"""An index of a dataset's rows: where each row is, how much text and media it has, and which are rejected and why.

A file is parsed once from end to end. Its index is stored in the user's cache (MMDORA_CACHE, or XDG_CACHE_HOME/mmdora)
as numpy arrays that are memory-mapped. Opening an indexed file of any size takes as long as mapping a few arrays,
processes share them, and a sample is parsed from its row when it is accessed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import time
import uuid
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipelines.formats.registry import Format, Place, Where, check_links, matches, printable
from data_pipelines.rows import RowError
from data_pipelines.samples import Image, Rejected, Sample, SampleError, Text
from mmdora.core.distributed import is_main
from mmdora.core.errors import UserError

VERSION = 3  # of the index format; an index of another version is rebuilt
REJECTED, REPEATED = 1, 2  # bits of `flags`
FRESH = 2.0  # seconds: a file modified so shortly before it was read may change again with the same time stamp
BYTES_PER_TOKEN = 4  # to estimate the tokens of a text
LARGE = 2**26  # bytes from which on a progress bar is shown
ID_KEYS = ("id", "question_id", "__key__")
T = TypeVar("T")


class Index:
    """The rows that `where` selects: arrays over them in file order, and access to each as a sample.

    `number` is the row's number in the file, `text` the estimated tokens of its text, `images` and `videos` count its
    media. `flags` has the bits REJECTED (not a valid sample) and REPEATED (an earlier row has the same id).
    """

    number: np.ndarray
    text: np.ndarray
    images: np.ndarray
    videos: np.ndarray
    flags: np.ndarray

    def __init__(self, dataset_format: Format, path: Path, files: list[Path], media: Path, folder: Path):
        self.format, self.path, self.files, self.media, self.folder = dataset_format, path, files, media, folder
        self.root = str(media.resolve())
        self.reader = dataset_format.reader(files, media, folder)
        arrays = _retried(lambda: {p.stem: _load_array(p) for p in folder.iterdir() if p.suffix == ".npy"})
        self.number, self.flags = arrays.pop("number"), arrays.pop("flags")
        self.text, self.images, self.videos = arrays.pop("text"), arrays.pop("images"), arrays.pop("videos")
        self.reader.arrays = arrays

    def __reduce__(self) -> tuple[Any, ...]:  # a spawned process maps the same files
        return Index, (self.format, self.path, self.files, self.media, self.folder)

    def __len__(self) -> int:
        return len(self.number)

    def sample(self, at: int) -> Sample:
        """Parse the row at a position of the index. Raises SampleError if it can no longer be read."""
        number = int(self.number[at])
        name = f"row-{number}"
        try:
            row = self.reader.read(number)
            name = row_id(row, number)
            name += f"#{number}" if self.flags[at] & REPEATED else ""
            sample = self.format.parse(row, Place(name, str(self.path), self.root))
            check_links(sample, self.root)
            return sample
        except RowError as error:
            raise SampleError(name, str(self.path), str(error), "parse", error.media) from error
        except (OSError, ValueError, LookupError, RecursionError, StopIteration) as error:
            reason = f"its row can no longer be read ({error}); was the file changed meanwhile?"
            raise SampleError(name, str(self.path), reason, "parse") from error

    def rejected(self) -> Iterator[tuple[int, Rejected]]:
        """Iterate over the rows that are not valid samples, with their positions in the index."""
        with _retried(lambda: (self.folder / "rejected.jsonl").open(encoding="utf-8")) as file:
            for line in file:
                at, name, reason, media = json.loads(line)
                yield at, Rejected(name, str(self.path), reason, media)


def open_index(dataset_format: Format, path: Path, media: Path, where: Where) -> Index:
    """Return the index of a file, from the cache or newly built. Raises UserError if the file is missing or
    unreadable, or if the cache cannot be written."""
    files = dataset_format.files(path, media)
    class_name = f"{type(dataset_format).__module__}.{type(dataset_format).__qualname__}"
    key = [str(path.resolve()), str(media.resolve()), class_name, dict(where)]
    name = f"{path.stem[:40]}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}"
    try:
        folder = cache_folder() / name
        signature = _signature(dataset_format, dataset_format.dependencies(files, media))
        if not _is_valid(folder, signature):
            _build(dataset_format, path, files, media, where, folder, signature)
        return Index(dataset_format, path, files, media, folder)
    except OSError as error:
        reason = f"{error.filename or cache_folder()}: {error.strerror or error}"
        raise UserError(f"{reason} (while indexing {path}; MMDORA_CACHE sets the cache folder)") from error


def cache_folder() -> Path:
    """Return the folder that holds the indexes."""
    own = os.environ.get("MMDORA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(base) / "mmdora").expanduser() / "index"


def row_id(row: Any, number: int) -> str:
    """Return the id of a row, or `row-<number>` if it has none. Raises RowError."""
    if isinstance(row, dict):
        for key in ID_KEYS:
            if (value := row.get(key)) is not None and value != "":
                if not isinstance(value, str | int | float):
                    raise RowError(f"{key!r} must be a string or a number, not {type(value).__name__}")
                return printable(str(value))
    return f"row-{number}"


def _signature(dataset_format: Format, dependencies: list[Path]) -> dict[str, Any]:
    """Identify the inputs of an index: sizes and time stamps of the files, and the code of the format."""
    stats = [(str(file), s.st_size, s.st_mtime_ns) for file in dependencies for s in [file.stat()]]
    with suppress(TypeError, OSError):
        stats.append(("code", zlib.crc32(Path(inspect.getfile(type(dataset_format))).read_bytes()), 0))
    return {"version": VERSION, "files": zlib.crc32(json.dumps(stats).encode()), "bytes": sum(s[1] for s in stats)}


def _is_valid(folder: Path, signature: dict[str, Any]) -> bool:
    """Whether the folder holds an undamaged index of the files in their present state."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return (
            meta["signature"] == signature
            and not meta["fresh"]
            and all(_digest(folder / name) == digest for name, digest in meta["digests"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _digest(file: Path) -> list[int]:
    """Size and checksum. Converted tables, which may have many GB, are identified by their size only."""
    return [file.stat().st_size, 0 if file.suffix == ".arrow" else zlib.crc32(file.read_bytes())]


def _build(
    dataset_format: Format,
    path: Path,
    files: list[Path],
    media: Path,
    where: Where,
    folder: Path,
    signature: dict[str, Any],
) -> None:
    """Write the index to a temporary folder and rename it. Several processes may do so at the same time."""
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    old = temporary.with_suffix(".old")
    temporary.mkdir(parents=True)
    try:
        newest = max(file.stat().st_mtime for file in dataset_format.dependencies(files, media))
        meta: dict[str, Any] = {"signature": signature, "fresh": abs(time.time() - newest) < FRESH}
        with _progress(path, sum(file.stat().st_size for file in files)) as advance:
            _scan(dataset_format, path, files, media, where, temporary, advance)
        written = [file for file in temporary.iterdir() if file.suffix in (".npy", ".jsonl", ".arrow")]
        meta["digests"] = {file.name: _digest(file) for file in written}
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        for _ in range(10):
            with suppress(OSError):  # there is none, or another process has just moved it
                folder.rename(old)
            try:
                temporary.rename(folder)
                return
            except OSError:
                if _is_valid(folder, signature):  # another process built the same index
                    return
            shutil.rmtree(old, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _load_array(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r" if file.stat().st_size > 128 else None)


def _retried(read: Callable[[], T]) -> T:
    """Call `read` until it succeeds: another process may be renaming the index at this moment."""
    for _ in range(50):
        try:
            return read()
        except FileNotFoundError:
            time.sleep(0.02)
    return read()


def _scan(
    dataset_format: Format,
    path: Path,
    files: list[Path],
    media: Path,
    where: Where,
    folder: Path,
    advance: Callable[[int], None],
) -> None:
    """Parse every row once and write the index arrays and `rejected.jsonl`."""
    reader, root, source = dataset_format.reader(files, media, folder), str(media.resolve()), str(path)
    numbers, flags = array("q"), array("B")
    texts, images, videos = array("L"), array("L"), array("L")
    seen: set[int] = set()
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected:
        for number, row in enumerate(reader.scan()):
            if number % 1024 == 0:
                advance(reader.done)
            name, flag, size = f"row-{number}", 0, (0, 0, 0)
            try:
                if isinstance(row, RowError):  # rejected whatever `where` says, since its fields are unknown
                    raise row
                if where and not matches(row, where):
                    continue
                name = row_id(row, number)
                # Ids repeat in LLaVA's own mixes: one image, several conversations. Hashes need less memory than ids.
                if hash(name) in seen:
                    name, flag = f"{name}#{number}", REPEATED
                seen.add(hash(name))
                size = measure(dataset_format.parse(row, Place(name, source, root)))
            except (RowError, RecursionError) as error:
                flag |= REJECTED
                reason, file = str(error), error.media if isinstance(error, RowError) else None
                name = error.id or name if isinstance(error, RowError) else name
                entry = [len(numbers), printable(name), printable(reason), file and printable(file)]
                rejected.write(json.dumps(entry) + "\n")
            numbers.append(number)
            flags.append(flag)
            for column, count in zip((texts, images, videos), size, strict=True):
                column.append(count)
    arrays: dict[str, np.ndarray] = {
        "number": np.array(numbers, np.int64),
        "flags": np.array(flags, np.uint8),
        "text": np.array(texts, np.uint32),
        "images": np.array(images, np.uint32),
        "videos": np.array(videos, np.uint32),
    }
    for key, values in (arrays | reader.arrays).items():
        np.save(folder / f"{key}.npy", values)


def measure(sample: Sample) -> tuple[int, int, int]:
    """Return the estimated tokens of the sample's text, and its numbers of images and videos."""
    text, images, videos = 0, 0, 0
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Text):
                text += len(part.text) if part.text.isascii() else len(part.text.encode())
            elif isinstance(part, Image):
                images += 1
            else:
                videos += 1
    return -(-text // BYTES_PER_TOKEN), images, videos


@contextmanager
def _progress(path: Path, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on rank 0's stderr, for large files; yields `update(done)` with the bytes parsed so far."""
    if total < LARGE or not is_main():
        yield lambda done: None
        return
    from rich.console import Console

    from mmdora.core.console import progress_bar

    shown = 0

    def update(done: int) -> None:
        nonlocal shown
        advance(done - shown)
        shown = done

    with progress_bar(Console(stderr=True), f"indexing {path.name}", total, in_bytes=True) as advance:
        yield update
        update(total)
