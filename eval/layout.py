"""Read benchmarks' official files. Errors name a missing, misplaced or malformed file and the expected layout."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
TYPES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    int | str: "an id",
    dict: "an object",
    list: "a list",
    list[str]: "a list of strings",
}


def find_file(data: str, candidates: Sequence[str], layout: str) -> Path:
    """Return the file of questions: `data` itself if it is a file, else the first candidate in the folder `data`.

    `candidates` are relative paths, which may contain wildcards. Raises UserError with the layout.
    """
    root = find_path(data)
    if root.is_file():
        return root
    for pattern in candidates:
        if found := sorted(path for path in root.glob(pattern) if path.is_file()):
            return found[0]
    problem = "no such file or folder" if not root.exists() else f"holds no {' or '.join(candidates)}"
    raise UserError(f"{root}: {problem}; expected layout:\n{layout}")


def find_folder(data: str, candidates: Sequence[str], media: str | None, layout: str) -> Path:
    """Return the folder of media files: `media` if the config names one, else the first candidate that exists.

    Candidates are looked up in the folder `data` (or beside the file `data`), then in its parent. If none exists, the
    first is returned: read_questions checks every media file later.
    """
    if media is not None:
        return find_path(media)
    root = find_path(data)
    root = root.parent if root.is_file() else root
    places = [folder / name for folder in (root, root.parent) for name in candidates]
    return next((place for place in places if place.is_dir()), places[0])


def warn_of_missing(data: str, missing: Sequence[str], layout: str) -> None:
    """Warn that a benchmark of several parts is scored without the missing ones."""
    if missing:
        log.warning(
            "%s: scoring an incomplete benchmark, %s is missing; expected layout: %s", data, ", ".join(missing), layout
        )


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank."""
    return [line for line in _text(path).split("\n") if line.strip()]


def read_json(path: Path, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read a JSON file. Raises UserError that names the file and the position of the syntax error."""
    text = _text(path)
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except UserError:  # from `make_object`
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: Path) -> list[Any]:
    """Read a JSON-lines file, skipping blank lines. Raises UserError that names the file and the line."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would also split at U+2028
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def read_rows(path: Path) -> list[Any]:
    """Read a JSON list or JSON lines, whatever the file's suffix: POPE's `.json` files are JSON lines.

    Raises UserError that names the file and the line that is not JSON.
    """
    if not _text(path).lstrip().startswith(("[", "{\n")):
        return read_jsonl(path)
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects or one object per line; found a single object")
    return rows


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file. Raises UserError if it is not one."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return list(parquet.ParquetFile(path).read().to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_table(path: Path, delimiter: str = ",", names: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Read a CSV or TSV file as one dict per row. `names` are the columns of a file without a header line.

    Raises UserError that names the file and a row whose columns do not match the header.
    """
    csv.field_size_limit(1 << 30)  # MMBench stores whole images in cells
    lines = (f"{line}\n" for line in _text(path).split("\n"))  # a StringIO would take four times the file's size
    reader = csv.DictReader(lines, fieldnames=names, delimiter=delimiter)
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise UserError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} columns")
        rows.append(row)
    return rows


def fields(row: Any, path: Path, where: str, *names: str) -> Iterator[Any]:
    """Yield the values of a row's fields. Raises UserError that names the file, the row and a missing field."""
    if not isinstance(row, dict):
        raise UserError(f"{path}, {where}: expected an object, found {type(row).__name__}")
    for name in names:
        if name not in row:
            raise UserError(f"{path}, {where}: no field {name!r}")
        yield row[name]


def typed(row: Any, path: Path, where: str, name: str, kind: type[T]) -> T:
    """Return a row's field of type `kind`, one of TYPES. Raises UserError that names file, row and field."""
    (value,) = typed_fields(row, path, where, **{name: kind})
    return value


def typed_fields(row: Any, path: Path, where: str, **kinds: Any) -> Iterator[Any]:
    """Yield the values of a row's fields with their types, which are among TYPES. Raises UserError for other types."""
    for (name, kind), value in zip(kinds.items(), fields(row, path, where, *kinds), strict=True):
        if not _is(value, kind):
            raise UserError(f"{path}, {where}: {name!r} is {value!r:.60}, not {TYPES[kind]}")
        yield value


def read_predicted(path: Path) -> Any:
    """Read a file of predictions: a JSON value, or JSON lines, which evaluation scripts also write to `.json` files.

    Raises UserError that names the file and the syntax error, or a key that an object has twice (json.loads would keep
    the last).
    """
    first, _, rest = _text(path).strip().partition("\n")
    is_lines = path.suffix == ".jsonl" or (first.startswith("{") and first.rstrip().endswith("}") and rest)
    return read_jsonl(path) if is_lines else read_json(path, partial(_unique_keys, path))


def _unique_keys(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        duplicates = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise UserError(f"{path}: {len(duplicates)} keys occur twice in an object, such as {duplicates[0]!r}")
    return unique


def read_answers(path: Path, key: str = "id", value: str = "response") -> list[tuple[str, str]]:
    """Return (id, answer) of each row of a JSON list or JSON lines. Numbers are answers as they are written.

    Raises UserError that names the file and a row whose answer is neither text nor a number.
    """
    pairs = []
    for number, row in enumerate(read_rows(path)):
        question_id, answer = fields(row, path, f"row {number}", key, value)
        is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
        if not is_number and not isinstance(answer, str):
            raise UserError(f"{path}, row {number}: {value!r} is {json.dumps(answer):.60}, not text")
        pairs.append((str(question_id), answer if isinstance(answer, str) else json.dumps(answer)))
    return pairs


def read_answers_as(path: Path, *formats: tuple[str, str]) -> tuple[list[tuple[str, str]], tuple[str, str]]:
    """Return the answers, and which of several formats the file has.

    A format is a pair (id field, answer field). The first whose fields are in the file's first row is used. Raises
    UserError if there is none.
    """
    rows = read_rows(path)
    first = rows[0] if rows and isinstance(rows[0], dict) else dict.fromkeys(formats[0])
    chosen = next((names for names in formats if first.keys() >= set(names)), None)
    if chosen is None:
        expected = ", or ".join(" and ".join(map(repr, names)) for names in formats)
        raise UserError(f"{path}, row 0: expected {expected}; found {', '.join(map(repr, first)) or 'nothing'}")
    return read_answers(path, *chosen), chosen


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value has a type. A bool is not a number here, and `list[str]` checks the items."""
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
