"""Rows of the files that people have, by number and without holding them: JSON, CSV, Arrow, Parquet, tar shards."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from data_pipelines.rows.arrow import ArrowRows
from data_pipelines.rows.base import Blob, RowError, Rows
from data_pipelines.rows.tar import TarRows
from data_pipelines.rows.text import JsonLines, JsonList, Table
from mmdora.core.errors import UserError

__all__ = ["Blob", "JsonLines", "RowError", "Rows", "data_files", "rows_class"]

KINDS: dict[str, type[Rows]] = {
    ".json": JsonList,
    ".jsonl": JsonLines,
    ".csv": Table,
    ".tsv": Table,
    ".arrow": ArrowRows,
    ".parquet": ArrowRows,
    ".tar": TarRows,
}
SHARDED = (".arrow", ".parquet", ".tar")
MAX_FILES = 100_000
SPLITS = ("train", "test", "validation", "val", "dev")


def data_files(path: Path) -> list[Path]:
    """The files that a `path` names: itself, those of a folder, or those of a pattern (`shards-{0000..0009}.tar`,
    `part-*.parquet`), in order. Raises UserError where one is missing."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder(path)
    files = []
    for name in _braces(str(path)):
        one = Path(name)
        found = sorted(one.parent.glob(one.name)) if "*" in one.name else [one] if one.is_file() else []
        if not found:
            raise UserError(f"{name}: no such data file" + (f" (of {path})" if name != str(path) else ""))
        files += found
    return files


def rows_class(files: list[Path]) -> type[Rows]:
    """How these files are read. Raises UserError for a kind that is unknown, and for several kinds at once."""
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1:
        raise UserError(f"{files[0].parent}: holds files of several kinds ({', '.join(sorted(suffixes))}); name one")
    (suffix,) = suffixes
    if suffix not in KINDS:
        raise UserError(f"{files[0]}: a data file ends in one of {', '.join(KINDS)}")
    if len(files) > 1 and suffix not in SHARDED:
        raise UserError(f"{files[0]}: several {suffix} files are several entries; join them, or name each of its own")
    if suffix == ".json" and _holds_lines(files[0]):
        return JsonLines
    return KINDS[suffix]


def _folder(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise UserError(f"{path}: holds the splits {', '.join(splits)}; give one of these folders")
    files = sorted(p for p in path.rglob("*") if p.suffix in SHARDED and p.is_file())
    if (path / "state.json").is_file():  # datasets.save_to_disk; what else lies there is a cache of it
        files = [path / Path(name).name for name in _saved_files(path / "state.json")]
        if missing := [f for f in files if not f.is_file()]:
            raise UserError(f"{missing[0]}: is missing, and {path}/state.json names it")
    if not files:
        raise UserError(f"{path}: no data file in it; looked for {', '.join(SHARDED)}")
    if len(named := {file.name.split("-")[0].split(".")[0] for file in files} & {*SPLITS}) > 1:
        raise UserError(f"{path}: holds the splits {', '.join(sorted(named))}; name one, as {path}/train-*.parquet")
    return files


def _saved_files(state: Path) -> list[str]:
    try:
        return [str(entry["filename"]) for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state}: does not say which files the dataset has ({error!r})") from error


def _braces(pattern: str) -> list[str]:
    """`a-{00..02}.tar` → `a-00.tar`, `a-01.tar`, `a-02.tar`; `{a,b}` likewise."""
    pieces: list[list[str]] = []
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        if span := re.fullmatch(r"\{(\d{1,9})\.\.(\d{1,9})\}", piece):
            low, high = span.groups()
            if not int(low) <= int(high) < int(low) + MAX_FILES:
                raise UserError(f"{pattern}: {piece} must count up, to at most {MAX_FILES} files")
            pieces.append([str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)])
        elif piece.startswith("{") and "," in piece:
            pieces.append(piece[1:-1].split(","))
        else:
            pieces.append([piece])
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _holds_lines(path: Path) -> bool:
    """Whether a file named .json has a JSON object a line, as those of `datasets` do."""
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
