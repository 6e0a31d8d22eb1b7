"""What the formats share: JSON and JSONL rows with clear errors, and media paths that stay inside their root."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.formats.registry import Where
from data_pipelines.samples import Rejected, Sample
from mmdora.errors import UserError


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list or of a JSON-lines file. Raises UserError that names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        if path.suffix == ".jsonl":
            return read_lines(path)
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of samples, found {type(rows).__name__}")
    return rows


def read_lines(path: Path) -> list[Any]:
    """The rows of a file that has one JSON value a line, whatever its name ends in. Raises UserError."""
    text = path.read_text(encoding="utf-8")
    return [_line(path, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: line {number} is not valid JSON ({error})") from error


def kept(row: Any, where: Where) -> bool:
    """Whether the row's fields have the values that `where` asks for; 3 and "3" are the same."""
    return isinstance(row, dict) and all(str(row.get(k)) in {str(v) for v in values} for k, values in where.items())


class RowError(ValueError):
    """A row that is no sample; `media` is the path at fault, if one is."""

    def __init__(self, reason: str, media: str | None = None):
        super().__init__(reason)
        self.media = media


def parse_rows(path: Path, where: Where, parse: Callable[[Any, str], Sample]) -> Iterator[Sample | Rejected]:
    """Every row that `where` keeps through `parse(row, id)`; a RowError becomes a `Rejected`."""
    seen: set[str] = set()
    for index, row in enumerate(read_rows(path)):
        if where and not kept(row, where):
            continue
        row_id = row.get("id") if isinstance(row, dict) else None
        sample_id = f"row-{index}" if row_id is None else str(row_id)
        if sample_id in seen:
            sample_id = f"{sample_id}#{index}"  # ids repeat in LLaVA's own mixes: one image, several conversations
        seen.add(sample_id)
        try:
            yield parse(row, sample_id)
        except RowError as error:
            yield Rejected(sample_id, str(path), str(error), error.media)


def media_path(value: Any, root: Path) -> Path:
    """The file that a row names, inside `root`. Raises RowError for addresses and for paths that leave the root."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise RowError(f"a media path must be a non-empty string, found {value!r}")
    if "://" in value:
        raise RowError(f"{value!r} is an address; download it and give the file's path", value)
    path = (root / value).resolve()
    if not path.is_relative_to(root.resolve()):
        raise RowError(f"{value!r} leaves the media folder {root}", value)
    return path
