"""Read result directories: `report.json` holds the figures, `scores.jsonl` one line per question."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.layout import fields, read_json, read_jsonl, typed_fields
from mmdora.core.errors import UserError

REPORT = {"name": str, "benchmark": str, "n": int, "scores": dict, "categories": dict, "receipt": dict}
ROW: dict[str, Any] = {
    "id": str,
    "question": str,
    "media": list[str],
    "references": list[str],
    "response": str,
    "cluster": str,
    "categories": list[str],
    "details": dict,
    "counts": dict,
}
FIGURES = {"scores": ("value", "low", "high"), "categories": ("n", "value")}  # a score may be null instead
SCORES = ("official", "strict")  # finite numbers, or null if the split's answers are not public


@dataclass(frozen=True)
class Result:
    """One model's answers and scores on one benchmark, written by `mmdora eval` or `mmdora score`."""

    folder: Path
    report: dict[str, Any]
    rows: list[dict[str, Any]]  # id, question, media, references, response, cluster, categories, details, scores

    @property
    def name(self) -> str:
        return str(self.report["name"])

    @property
    def benchmark(self) -> str:
        return str(self.report["benchmark"])

    @property
    def receipt(self) -> dict[str, Any]:
        return dict(self.report["receipt"])


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause the cyclic garbage collector while many rows are read.

    Rows hold no reference cycles, and with VQAv2's 214,354 questions the collector takes two thirds of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def find_results(folder: Path) -> list[Path]:
    """Return `folder` if it is a result, else the results of a run, else the results inside the folder.

    Raises UserError if there are none.
    """
    if (folder / "report.json").is_file():
        return [folder]
    for parent in (folder / "eval", folder):
        if found := sorted(path.parent for path in parent.glob("*/report.json")):
            return found
    problem = "no such folder" if not folder.is_dir() else "holds no result"
    raise UserError(
        f"{folder}: {problem}; give a result (a folder with a report.json, such as <run>/eval/<name>), a run, "
        "or a folder of results"
    )


def read_result(folder: Path) -> Result:
    """Read a result. Raises UserError if it is unfinished, or its two files do not fit together."""
    if not (folder / "report.json").is_file():
        raise UserError(f"{folder}: no report.json; a result is a folder such as <run>/eval/<name>")
    result = Result(folder, read_report(folder), read_scores(folder))
    if result.report["n"] != len(result.rows):
        n = result.report["n"]
        raise UserError(f"{folder}: report.json has n = {n}, but scores.jsonl has {len(result.rows)} questions")
    if not result.rows:
        raise UserError(f"{folder}: the result has no questions")
    duplicates = [i for i, count in Counter(row["id"] for row in result.rows).items() if count > 1]
    if duplicates:
        raise UserError(f"{folder / 'scores.jsonl'}: {len(duplicates)} duplicate ids, such as {duplicates[0]!r}")
    return result


def read_report(folder: Path) -> dict[str, Any]:
    """Read `report.json`. Raises UserError if it is not a report."""
    path = folder / "report.json"
    report = read_json(path)
    list(typed_fields(report, path, "the report", **REPORT))
    for part, names in FIGURES.items():
        for name, figure in report[part].items():
            if figure is not None:
                where = f"{part}: {name}"
                _check_numbers(dict(zip(names, fields(figure, path, where, *names), strict=True)), path, where)
    _check_numbers({"unparsed_rate": report.get("unparsed_rate")}, path, "the report")
    return report


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Read `scores.jsonl`. Raises UserError that names an invalid line."""
    path = folder / "scores.jsonl"
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        where = f"row {number}"
        list(typed_fields(row, path, where, **ROW))
        scores = dict(zip(SCORES, fields(row, path, where, *SCORES), strict=True)) | {"judged": row.get("judged")}
        _check_numbers(scores | row["counts"], path, where)
    return rows


def _check_numbers(row: dict[str, Any], path: Path, where: str) -> None:
    for key, value in row.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise UserError(f"{path}, {where}: {key!r} is {value!r:.60}, not a number")
