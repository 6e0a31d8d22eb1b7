"""Reading benchmarks' official files: a missing, misplaced or malformed one is named, with the layout expected."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdora.config_files import find_path
from mmdora.errors import UserError


def find_file(data: str, candidates: Sequence[str], layout: str) -> Path:
    """The questions' file: `data` itself, if it is a file, else the first of `candidates` (relative paths, which may
    hold wildcards) that lies in the folder `data`. Raises UserError with the layout."""
    root = find_path(data)
    if root.is_file():
        return root
    for pattern in candidates:
        if found := sorted(path for path in root.glob(pattern) if path.is_file()):
            return found[0]
    what = "no such file or folder" if not root.exists() else f"holds no {' or '.join(candidates)}"
    raise UserError(f"{root}: {what}; expected layout:\n{layout}")


def find_folder(data: str, candidates: Sequence[str], media: str | None, layout: str) -> Path:
    """Where the media lie: `media`, if the config names a folder, else the first of `candidates` in the folder `data`
    (or beside the file `data`), else the first that should be: whether the media are there is asked of each file."""
    if media is not None:
        return find_path(media)
    root = find_path(data)
    root = root.parent if root.is_file() else root
    return next((root / name for name in candidates if (root / name).is_dir()), root / candidates[0])


def read_json(path: Path) -> Any:
    """A JSON file. Raises UserError that names the file, and where in it the JSON ends to be one."""
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: Path) -> list[Any]:
    """A JSON-lines file, blank lines left out. Raises UserError that names the file and the line."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would cut at U+2028 too
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def read_table(path: Path, delimiter: str = ",", names: Sequence[str] | None = None) -> list[dict[str, str]]:
    """A CSV or TSV file as one dict a row; `names` for a file without a header line.

    Raises UserError that names the file and the row that has other columns than the header.
    """
    csv.field_size_limit(1 << 30)  # MMBench has whole pictures in its cells
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), fieldnames=names, delimiter=delimiter)
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise UserError(f"{path}, line {reader.line_num}: not the {len(reader.fieldnames or ())} columns expected")
        rows.append(row)
    return rows


def fields(row: Any, path: Path, where: str, *names: str) -> Iterator[Any]:
    """The values of a row's fields. Raises UserError that names the file, the row and the field it lacks."""
    if not isinstance(row, dict):
        raise UserError(f"{path}, {where}: expected an object, found {type(row).__name__}")
    for name in names:
        if name not in row:
            raise UserError(f"{path}, {where}: no field {name!r}")
        yield row[name]


def read_answers(path: Path, key: str = "id", value: str = "response") -> list[tuple[str, str]]:
    """(id, answer) of each row of a JSON list or a JSON-lines file; numbers are taken as they are written.

    Raises UserError that names the file and the row whose answer is neither text nor a number.
    """
    rows = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects with {key!r} and {value!r}")
    pairs = []
    for number, row in enumerate(rows):
        question_id, answer = fields(row, path, f"row {number}", key, value)
        if not isinstance(answer, str | int | float) or (isinstance(answer, float) and not math.isfinite(answer)):
            raise UserError(f"{path}, row {number}: {value!r} is {json.dumps(answer):.60}, not text")
        pairs.append((str(question_id), answer if isinstance(answer, str) else json.dumps(answer)))
    return pairs


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
