"""Read rows of WebDataset shards: adjacent members of a tar whose names are equal up to the first dot form one row.

Nothing is unpacked. A scan reads the headers and the text members; the files of a row are then read in place. This is
random access, so order, resuming and the split over processes work as for every other format.
Source: https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.rows.base import Blob, RowDecoder, RowError, RowReader
from mmdora.core.errors import UserError

BLOCK = 512  # bytes of a header; data are padded to whole blocks
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
VIDEOS = ("mp4", "webm", "mkv", "mov", "avi")
TEXTS = ("json", "txt", "cls")


@dataclass(frozen=True)
class Member:
    """One file in a shard."""

    name: str
    offset: int  # of its data in the shard, in bytes
    size: int  # bytes
    fault: str | None = None

    @property
    def key(self) -> str:
        """The name up to the first dot of the file name, which members of one row share."""
        folder, _, base = self.name.rpartition("/")
        stem = base.partition(".")[0]
        return f"{folder}/{stem}" if folder else stem

    @property
    def suffix(self) -> str:
        """The part of the file name after the first dot, in lower case."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class TarReader(RowReader):
    """Rows of .tar files."""

    def __init__(self, files: list[Path], folder: Path):
        super().__init__(files, folder)
        self._decoder = RowDecoder()

    def scan(self) -> Iterator[Any]:
        columns = {name: array("q") for name in ("shard", "offset", "size", "first", "name_end")}
        names = bytearray()
        for number, path in enumerate(self.files):
            with path.open("rb") as file:
                if file.read(2) == b"\x1f\x8b":
                    raise UserError(f"{path}: is compressed and has no random access; decompress it with gunzip")
                for group in groups(file, path.stat().st_size):
                    columns["first"].append(len(columns["shard"]))
                    for member in group:
                        columns["shard"].append(number)
                        columns["offset"].append(member.offset)
                        columns["size"].append(member.size)
                        names += member.name.encode("utf-8", "surrogateescape")
                        columns["name_end"].append(len(names))
                    try:
                        yield self._row(file, path.name, group, scanning=True)
                    except RowError as error:
                        yield error
                    self.done = sum(f.stat().st_size for f in self.files[:number]) + group[-1].offset
        columns["first"].append(len(columns["shard"]))
        self.arrays = {name: np.array(column, np.int64) for name, column in columns.items()}
        self.arrays["names"] = np.frombuffer(bytes(names), np.uint8)

    def read(self, number: int) -> Any:
        a = self.arrays
        group = []
        for i in range(int(a["first"][number]), int(a["first"][number + 1])):
            begin = int(a["name_end"][i - 1]) if i else 0
            name = a["names"][begin : int(a["name_end"][i])].tobytes().decode("utf-8", "surrogateescape")
            group.append(Member(name, int(a["offset"][i]), int(a["size"][i])))
        path = self.files[int(a["shard"][int(a["first"][number])])]
        with path.open("rb", buffering=0) as file:
            return self._row(file, path.name, group, scanning=False)

    def _row(self, file: BinaryIO, shard: str, group: list[Member], scanning: bool) -> dict[str, Any]:
        """Return the fields of a row: those of its JSON, its text and class, and its images and videos as Blobs."""
        key = f"{shard}/{group[0].key}"
        for member in group:
            if member.fault:
                raise RowError(member.fault, f"{shard}/{member.name}", key)
        suffixes = [member.suffix for member in group]
        if doubled := [s for s in suffixes if suffixes.count(s) > 1]:
            raise RowError(f"has two files with the suffix .{doubled[0]}", id=key)
        row: dict[str, Any] = {}
        media: dict[str, list[Blob]] = {"image": [], "video": []}
        for member in sorted(group, key=lambda m: m.name):
            kind = member.suffix.rpartition(".")[2]
            if kind in IMAGES or kind in VIDEOS:
                data = b"" if scanning else read_member(file, member)
                media["image" if kind in IMAGES else "video"].append(Blob(Path(shard, member.name), data))
            elif member.suffix in TEXTS:
                row |= self._text(member, read_member(file, member), key)
        if media["image"] or media["video"]:  # they replace the media that the JSON names
            row = {k: v for k, v in row.items() if k not in ("image", "images", "video", "videos")}
            row |= {name: blobs for name, blobs in media.items() if blobs}
        return {"__key__": key} | row

    def _text(self, member: Member, data: bytes, key: str) -> dict[str, Any]:
        try:
            if member.suffix != "json":
                return {"caption" if member.suffix == "txt" else "category": data.decode().strip()}
            value = self._decoder.whole(data)
        except (ValueError, RecursionError) as error:
            raise RowError(f".{member.suffix} cannot be read ({error})", id=key) from error
        if isinstance(value, RowError):
            raise RowError(f".json: {value}", id=key)
        if not isinstance(value, dict):
            return {"messages": value}
        return value


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Read the data of a member. Raises RowError if the shard ends before it."""
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) < member.size:
        raise RowError(f"{member.name} is truncated", member.name)
    return data


def groups(file: BinaryIO, size: int) -> Iterator[list[Member]]:
    """Iterate over the rows: groups of adjacent members with one key. A damaged range is a group of its own."""
    group: list[Member] = []
    for member in members(file, size):
        if group and (member.key != group[0].key or member.fault or group[0].fault):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Iterate over the files in a shard of `size` bytes. A damaged range is a member with a `fault`, and iteration
    continues at the next valid header."""
    at = 0
    while at < size:
        file.seek(at)
        reached = at
        try:
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                    reached = max(reached, info.offset)
                    if info.size < 0 or tar.offset <= info.offset:
                        raise tarfile.ReadError("invalid size")
                    if not info.isdir():
                        yield _member(info, size)
                    reached = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, OSError):
            pass  # `reached` is where the damage begins; it is yielded below, when its end is known
        if reached >= size or _is_zero_block(file, reached):
            return
        at = _next_header(file, max(reached, at) + BLOCK, size)
        name = f"bytes {reached} to {at}"
        yield Member(name, reached, 0, "the shard is damaged here")


def _member(info: tarfile.TarInfo, size: int) -> Member:
    fault = None
    if not info.isreg() or info.sparse is not None:
        fault = "is not a regular file"
    elif info.offset_data + info.size > size:
        fault = "is truncated by the end of the shard"
    return Member(info.name, info.offset_data, info.size, fault)


def _is_zero_block(file: BinaryIO, at: int) -> bool:
    """Whether there is a block of zeros, which marks the end of an archive."""
    file.seek(at)
    return not file.read(BLOCK).strip(b"\0")


def _next_header(file: BinaryIO, at: int, size: int) -> int:
    """Return the offset of the next header with a valid checksum, or `size`."""
    while at < size:
        file.seek(at)
        block = file.read(BLOCK)
        if block[257:262] == b"ustar":
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return at
            except (tarfile.TarError, ValueError):
                pass
        at += BLOCK
    return size
