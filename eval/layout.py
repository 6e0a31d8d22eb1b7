"""Reading benchmarks' official files: a missing, misplaced or malformed one is named, with the layout expected."""

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
    (or beside the file `data`) or in the one above, else the first that should be: whether the media are there is asked
    of each file."""
    if media is not None:
        return find_path(media)
    root = find_path(data)
    root = root.parent if root.is_file() else root
    places = [folder / name for folder in (root, root.parent) for name in candidates]
    return next((place for place in places if place.is_dir()), places[0])


def warn_of_missing(data: str, missing: Sequence[str], layout: str) -> None:
    """Say what of a benchmark of several parts is not there: it is scored on the others."""
    if missing:
        log.warning(
            "%s: no %s, so it is not the whole benchmark; expected layout: %s", data, ", ".join(missing), layout
        )


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, blank ones left out."""
    return [line for line in _text(path).split("\n") if line.strip()]


def read_json(path: Path, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON file. Raises UserError that names the file, and where in it the JSON ends to be one."""
    text = _text(path)
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except UserError:  # of `make_object`
        raise
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


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list, or of JSON lines whatever the file's suffix: POPE's `.json` files are JSON lines.

    Raises UserError that names the file, and the line that is not JSON.
    """
    if not _text(path).lstrip().startswith(("[", "{\n")):
        return read_jsonl(path)
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects, or an object a line; found one object")
    return rows


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file. Raises UserError that names a file which is none."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return list(parquet.ParquetFile(path).read().to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_table(path: Path, delimiter: str = ",", names: Sequence[str] | None = None) -> list[dict[str, str]]:
    """A CSV or TSV file as one dict a row; `names` for a file without a header line.

    Raises UserError that names the file and the row that has other columns than the header.
    """
    csv.field_size_limit(1 << 30)  # MMBench has whole pictures in its cells
    lines = (f"{line}\n" for line in _text(path).split("\n"))  # a StringIO would take four times the file
    reader = csv.DictReader(lines, fieldnames=names, delimiter=delimiter)
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


def typed(row: Any, path: Path, where: str, name: str, kind: type[T]) -> T:
    """A row's field, which is of `kind`, one of TYPES. Raises UserError that names the file, the row and the field."""
    (value,) = typed_fields(row, path, where, **{name: kind})
    return value


def typed_fields(row: Any, path: Path, where: str, **kinds: Any) -> Iterator[Any]:
    """As `fields`, of these types by name, which are among TYPES. Raises UserError for a value of another type."""
    for (name, kind), value in zip(kinds.items(), fields(row, path, where, *kinds), strict=True):
        if not _is(value, kind):
            raise UserError(f"{path}, {where}: {name!r} is {value!r:.60}, not {TYPES[kind]}")
        yield value


def read_predicted(path: Path) -> Any:
    """A file of predictions: a JSON value, or JSON lines, which evaluation scripts write into `.json` files too.

    Raises UserError that names the file, and where it is not JSON, or the id that an object holds twice: JSON's reader
    would take the last.
    """
    first, _, rest = _text(path).strip().partition("\n")
    is_lines = path.suffix == ".jsonl" or (first.startswith("{") and first.rstrip().endswith("}") and rest)
    return read_jsonl(path) if is_lines else read_json(path, partial(_without_doubles, path))


def _without_doubles(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise UserError(f"{path}: {len(doubled)} ids or fields are there twice in an object, such as {doubled[0]!r}")
    return found


def read_answers(path: Path, key: str = "id", value: str = "response") -> list[tuple[str, str]]:
    """(id, answer) of each row of a JSON list or of JSON lines; numbers are taken as they are written.

    Raises UserError that names the file and the row whose answer is neither text nor a number.
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
    """Answers in the first of several formats, (id field, answer field), whose fields the file's first row has, and
    which format that was. Raises UserError where it has those of none."""
    rows = read_rows(path)
    first = rows[0] if rows and isinstance(rows[0], dict) else dict.fromkeys(formats[0])
    chosen = next((names for names in formats if first.keys() >= set(names)), None)
    if chosen is None:
        expected = ", or ".join(" and ".join(map(repr, names)) for names in formats)
        raise UserError(f"{path}, row 0: expected {expected}; found {', '.join(map(repr, first)) or 'nothing'}")
    return read_answers(path, *chosen), chosen


def _is(value: Any, kind: Any) -> bool:
    """As `isinstance`, but that JSON's true is no number; `list[str]` has nothing but strings inside."""
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
