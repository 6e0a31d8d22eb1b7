"""Readers of data files: rows of JSON, CSV, Arrow, Parquet and tar shards, read by number and not held in memory."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from data_pipelines.rows.arrow import ArrowReader
from data_pipelines.rows.base import Blob, RowError, RowReader
from data_pipelines.rows.tar import TarReader
from data_pipelines.rows.text import JsonLinesReader, JsonListReader, TableReader
from mmdora.core.errors import UserError

__all__ = ["Blob", "JsonLinesReader", "RowError", "RowReader", "data_files", "reader_class"]

READERS: dict[str, type[RowReader]] = {
    ".json": JsonListReader,
    ".jsonl": JsonLinesReader,
    ".csv": TableReader,
    ".tsv": TableReader,
    ".arrow": ArrowReader,
    ".parquet": ArrowReader,
    ".tar": TarReader,
}
SHARDED = (".arrow", ".parquet", ".tar")
MAX_FILES = 100_000
SPLITS = ("train", "test", "validation", "val", "dev")


def data_files(path: Path) -> list[Path]:
    """Return the files that a path stands for, in order: the file itself, the files of a folder, or the files of a
    pattern (`shards-{0000..0009}.tar`, `part-*.parquet`). Raises UserError if one is missing."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder_files(path)
    files = []
    for name in _expand_braces(str(path)):
        file = Path(name)
        matches = sorted(file.parent.glob(file.name)) if "*" in file.name else [file] if file.is_file() else []
        if not matches:
            raise UserError(f"{name}: no such data file" + (f" (from {path})" if name != str(path) else ""))
        files += matches
    return files


def reader_class(files: list[Path]) -> type[RowReader]:
    """Return the reader of the files' type. Raises UserError if the type is unknown, or if there are several types."""
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1:
        raise UserError(f"{files[0].parent}: files of several types ({', '.join(sorted(suffixes))}); select one type")
    (suffix,) = suffixes
    if suffix not in READERS:
        raise UserError(f"{files[0]}: unknown file type; known: {', '.join(READERS)}")
    if len(files) > 1 and suffix not in SHARDED:
        raise UserError(f"{files[0]}: one of several {suffix} files; merge them, or list each as an entry of its own")
    if suffix == ".json" and _holds_lines(files[0]):
        return JsonLinesReader
    return READERS[suffix]


def _folder_files(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise UserError(f"{path}: holds the splits {', '.join(splits)}; set the path to one of these folders")
    files = sorted(p for p in path.rglob("*") if p.suffix in SHARDED and p.is_file())
    if (path / "state.json").is_file():  # datasets.save_to_disk; other Arrow files there are its cache
        files = [path / Path(name).name for name in _saved_files(path / "state.json")]
        if missing := [f for f in files if not f.is_file()]:
            raise UserError(f"{missing[0]}: file is missing, but listed in {path}/state.json")
    if not files:
        raise UserError(f"{path}: no data file in this folder; known: {', '.join(SHARDED)}")
    if len(named := {file.name.split("-")[0].split(".")[0] for file in files} & {*SPLITS}) > 1:
        names = ", ".join(sorted(named))
        raise UserError(f"{path}: holds the splits {names}; select one, for example {path}/train-*.parquet")
    return files


def _saved_files(state: Path) -> list[str]:
    try:
        return [str(entry["filename"]) for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state}: does not list the files of the dataset ({error!r})") from error


def _expand_braces(pattern: str) -> list[str]:
    """Expand `a-{00..02}.tar` to `a-00.tar`, `a-01.tar`, `a-02.tar`, and `{a,b}` likewise."""
    pieces: list[list[str]] = []
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        if span := re.fullmatch(r"\{(\d{1,9})\.\.(\d{1,9})\}", piece):
            low, high = span.groups()
            if not int(low) <= int(high) < int(low) + MAX_FILES:
                raise UserError(f"{pattern}: {piece} must be ascending, with at most {MAX_FILES} files")
            pieces.append([str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)])
        elif piece.startswith("{") and "," in piece:
            pieces.append(piece[1:-1].split(","))
        else:
            pieces.append([piece])
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _holds_lines(path: Path) -> bool:
    """Whether a file named .json has one JSON object per line, as `datasets` writes it."""
    with path.open("rb") as file:
        first = file.readline(2**20).strip().removeprefix(b"\xef\xbb\xbf")
        while not first and (line := file.readline(2**20)):
            first = line.strip()
        if not first.startswith(b"{") or not file.read(64).strip():
            return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True
