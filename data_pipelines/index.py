"""An index of a dataset's rows: where each is, how much text and media it has, and which are rejected and why.

A file is parsed from end to end once; its index lies in the user's cache (MMDORA_CACHE, else XDG_CACHE_HOME/mmdora) as
numpy arrays that every process maps. So opening a file of any size takes as long as mapping a few arrays, processes
share them, and a sample is parsed from its row when it is wanted.
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

from data_pipelines.formats.registry import Format, Place, Where, check_links, kept, printable
from data_pipelines.rows import RowError
from data_pipelines.samples import Image, Rejected, Sample, SampleError, Text
from mmdora.core.distributed import is_main
from mmdora.core.errors import UserError

VERSION = 3  # of what an index holds; another version is built anew
REJECTED, REPEATED = 1, 2  # bits of `flags`
FRESH = 2.0  # seconds: a file that changed so shortly before it was read may change again at the same time stamp
CHARACTERS = 4  # bytes of text for an estimated token
LARGE = 2**26  # bytes: from here on a progress bar is shown
T = TypeVar("T")
ID_KEYS = ("id", "question_id", "__key__")


class Index:
    """The rows that `where` keeps: arrays over them in the file's order, and each as a sample.

    `number` is a row's place in the file, `text` an estimate of its text's tokens, `images` and `videos` count its
    media, `flags` are REJECTED (it is no sample) and REPEATED (its id was met before).
    """

    number: np.ndarray
    text: np.ndarray
    images: np.ndarray
    videos: np.ndarray
    flags: np.ndarray

    def __init__(self, form: Format, path: Path, files: list[Path], media: Path, folder: Path):
        self.form, self.path, self.files, self.media, self.folder = form, path, files, media, folder
        self.root = str(media.resolve())
        self.rows = form.rows(files, media, folder)
        arrays = _settled(lambda: {p.stem: _mapped(p) for p in folder.iterdir() if p.suffix == ".npy"})
        self.number, self.flags = arrays.pop("number"), arrays.pop("flags")
        self.text, self.images, self.videos = arrays.pop("text"), arrays.pop("images"), arrays.pop("videos")
        self.rows.arrays = arrays

    def __reduce__(self) -> tuple[Any, ...]:  # a process that is spawned maps the same files
        return Index, (self.form, self.path, self.files, self.media, self.folder)

    def __len__(self) -> int:
        return len(self.number)

    def sample(self, at: int) -> Sample:
        """The row at a place of the index. Raises SampleError where it is none any more."""
        number = int(self.number[at])
        name = f"row-{number}"
        try:
            row = self.rows.read(number)
            name = row_id(row, number)
            name += f"#{number}" if self.flags[at] & REPEATED else ""
            sample = self.form.parse(row, Place(name, str(self.path), self.root))
            check_links(sample, self.root)
            return sample
        except RowError as error:
            raise SampleError(name, str(self.path), str(error), "parse", error.media) from error
        except (OSError, ValueError, LookupError, RecursionError, StopIteration) as error:
            reason = f"its row cannot be read any more ({error}); was the file changed meanwhile?"
            raise SampleError(name, str(self.path), reason, "parse") from error

    def rejected(self) -> Iterator[tuple[int, Rejected]]:
        """The rows that are no samples, with their places in the index."""
        with _settled(lambda: (self.folder / "rejected.jsonl").open(encoding="utf-8")) as file:
            for line in file:
                at, name, reason, media = json.loads(line)
                yield at, Rejected(name, str(self.path), reason, media)


def open_index(form: Format, path: Path, media: Path, where: Where) -> Index:
    """The index of a file, from the cache or built now. Raises UserError for one that is missing or cannot be read."""
    files = form.files(path, media)
    key = [str(path.resolve()), str(media.resolve()), f"{type(form).__module__}.{type(form).__qualname__}", dict(where)]
    name = f"{path.stem[:40]}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}"
    try:
        folder = cache_folder() / name
        signature = _signature(form, form.watched(files, media))
        if not _is_whole(folder, signature):
            _build(form, path, files, media, where, folder, signature)
        return Index(form, path, files, media, folder)
    except OSError as error:
        where_at = error.filename or cache_folder()
        reason = f"{where_at}: {error.strerror or error}"
        raise UserError(f"{reason} (while {path} was indexed; MMDORA_CACHE names a folder to cache in)") from error


def cache_folder() -> Path:
    own = os.environ.get("MMDORA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(base) / "mmdora").expanduser() / "index"


def row_id(row: Any, number: int) -> str:
    """The name that a row gives itself, or its number. Raises RowError."""
    if isinstance(row, dict):
        for key in ID_KEYS:
            if (value := row.get(key)) is not None and value != "":
                if not isinstance(value, str | int | float):
                    raise RowError(f"{key!r} must be a string or a number, found {type(value).__name__}")
                return printable(str(value))
    return f"row-{number}"


def _signature(form: Format, watched: list[Path]) -> dict[str, Any]:
    """What an index was made from: the files as they are, and the code that reads them."""
    stats = [(str(file), s.st_size, s.st_mtime_ns) for file in watched for s in [file.stat()]]
    with suppress(TypeError, OSError):
        stats.append(("code", zlib.crc32(Path(inspect.getfile(type(form))).read_bytes()), 0))
    return {"version": VERSION, "files": zlib.crc32(json.dumps(stats).encode()), "bytes": sum(s[1] for s in stats)}


def _is_whole(folder: Path, signature: dict[str, Any]) -> bool:
    """Whether an index is there, of this very state of the files, and undamaged."""
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
    """Size and checksum; of a table that was written out, which may be many GB, the size alone."""
    return [file.stat().st_size, 0 if file.suffix == ".arrow" else zlib.crc32(file.read_bytes())]


def _build(
    form: Format, path: Path, files: list[Path], media: Path, where: Where, folder: Path, signature: dict[str, Any]
) -> None:
    """Write the index aside, then move it into its place: several processes may do so at once."""
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    old = aside.with_suffix(".old")
    aside.mkdir(parents=True)
    try:
        # A row of which `where` cannot know whether it is wanted, since it cannot be read, is told like any other.
        newest = max(file.stat().st_mtime for file in form.watched(files, media))
        meta: dict[str, Any] = {"signature": signature, "fresh": abs(time.time() - newest) < FRESH}
        with _progress(path, sum(file.stat().st_size for file in files)) as show:
            _scan(form, path, files, media, where, aside, show)
        written = [file for file in aside.iterdir() if file.suffix in (".npy", ".jsonl", ".arrow")]
        meta["digests"] = {file.name: _digest(file) for file in written}
        (aside / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        for _ in range(10):
            with suppress(OSError):  # there was none, or another process was first to move it
                folder.rename(old)
            try:
                aside.rename(folder)
                return
            except OSError:
                if _is_whole(folder, signature):  # another process built the same
                    return
            shutil.rmtree(old, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _mapped(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r" if file.stat().st_size > 128 else None)


def _settled(read: Callable[[], T]) -> T:
    """What `read` gives, for an index that another process may be putting into its place just now."""
    for _ in range(50):
        try:
            return read()
        except FileNotFoundError:
            time.sleep(0.02)
    return read()


def _scan(
    form: Format, path: Path, files: list[Path], media: Path, where: Where, folder: Path, show: Callable[[int], None]
) -> None:
    """Parse every row once, and write what is to be known of it."""
    rows, root, source = form.rows(files, media, folder), str(media.resolve()), str(path)
    numbers, flags = array("q"), array("B")
    texts, images, videos = array("L"), array("L"), array("L")
    seen: set[int] = set()
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as ledger:
        for number, row in enumerate(rows.scan()):
            if number % 1024 == 0:
                show(rows.done)
            name, flag, size = f"row-{number}", 0, (0, 0, 0)
            try:
                if isinstance(row, RowError):
                    raise row
                if where and not kept(row, where):
                    continue
                name = row_id(row, number)
                # Ids repeat in LLaVA's own mixes: one image, several conversations. Hashes take less than the ids.
                if hash(name) in seen:
                    name, flag = f"{name}#{number}", REPEATED
                seen.add(hash(name))
                size = measure(form.parse(row, Place(name, source, root)))
            except (RowError, RecursionError) as error:
                flag |= REJECTED
                reason, at_fault = str(error), error.media if isinstance(error, RowError) else None
                name = error.id or name if isinstance(error, RowError) else name
                entry = [len(numbers), printable(name), printable(reason), at_fault and printable(at_fault)]
                ledger.write(json.dumps(entry) + "\n")
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
    for key, values in (arrays | rows.arrays).items():
        np.save(folder / f"{key}.npy", values)


def measure(sample: Sample) -> tuple[int, int, int]:
    """An estimate of the tokens of the sample's text, and how many pictures and videos it has."""
    text, images, videos = 0, 0, 0
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Text):
                text += len(part.text) if part.text.isascii() else len(part.text.encode())
            elif isinstance(part, Image):
                images += 1
            else:
                videos += 1
    return -(-text // CHARACTERS), images, videos


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
