"""Many results as models × benchmarks: who is best, by how much, and whether that may be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.compare import Comparison, compare_kind, differences, has
from eval.metrics import holm
from eval.results import Result

CLEAR = 0.05  # p under which a difference is told as one


@dataclass
class Column:
    """A benchmark's results that can be held against each other, by model; another's prompt makes another column."""

    name: str
    benchmark: str
    results: dict[int, Result] = field(default_factory=dict)
    unlike: list[str] = field(default_factory=list)  # why it is not the first column of its name

    @property
    def first(self) -> Result:
        return next(iter(self.results.values()))


@dataclass(frozen=True)
class Cell:
    """A model's score, and how it stands to the best of its column: `behind` is None for the best itself."""

    value: float | None
    low: float | None
    high: float | None
    best: bool
    behind: Comparison | None


@dataclass(frozen=True)
class Board:
    models: list[str]
    columns: list[Column]


def arrange(named: Sequence[tuple[str | None, Result]]) -> Board:
    """Results as a table. A result belongs to the model of its given name, or of its weights; where that model has one
    in the column already, it is another model of the same name, told apart by a number."""
    models: list[tuple[str, str]] = []  # what holds results together, and the name shown
    columns: list[Column] = []
    for name, result in named:
        column = _column(columns, result)
        key = name or str(result.receipt.get("weights") or result.folder.resolve())
        shown = name or model_name(result)
        same = [i for i, model in enumerate(models) if model == (key, shown) and i not in column.results]
        if not same:
            same = [len(models)]
            models.append((key, shown))
        column.results[same[0]] = result
    return Board(_told_apart([shown for _, shown in models]), columns)


def _column(columns: list[Column], result: Result) -> Column:
    """The column that the result can be compared in, or a new one."""
    alike = [column for column in columns if column.benchmark == result.benchmark]
    for column in alike:
        if not differences(column.first, result):
            return column
    earlier = {column.name: column for column in columns}
    name = _numbered(result.name, set(earlier)) if result.name in earlier else result.name
    unlike = differences(earlier[result.name].first, result, (result.name, name)) if result.name in earlier else []
    columns.append(Column(name, result.benchmark, unlike=unlike))
    return columns[-1]


def _numbered(name: str, taken: set[str]) -> str:
    return next(f"{name} ({i})" for i in range(2, len(taken) + 3) if f"{name} ({i})" not in taken)


def _told_apart(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        found.append(_numbered(name, set(found)) if name in found else name)
    return found


def model_name(result: Result) -> str:
    """What `mmdora eval` was given, or the run that the result lies in, or the folder's name."""
    folder = result.folder.resolve()
    if target := result.receipt.get("target"):
        return Path(str(target)).name or str(target)
    if folder.parent.name == "eval":
        return folder.parent.parent.name
    if (folder.parent.name, folder.parent.parent.name) == ("before", "eval"):
        return f"{folder.parent.parent.parent.name}, before"
    return folder.parent.name if folder.name in (result.name, result.benchmark) else folder.name


def cells(column: Column, kind: str) -> dict[int, Cell]:
    """The column's scores of one kind by model, each held against the best (Holm over the column). None have it where
    the answers are not public, or nothing was judged."""
    having = {model: result for model, result in column.results.items() if has(result, kind)}
    figures = {model: result.report["scores"][kind] for model, result in having.items()}
    if not figures:
        return {}
    best = max(figures, key=lambda model: figures[model]["value"])
    behind = {model: compare_kind(having[best], having[model], kind) for model in having if model != best}
    found = {model: one for model, one in behind.items() if one is not None}
    for (model, one), p in zip(found.items(), holm([one.p for one in found.values()]), strict=True):
        behind[model] = replace(one, p_holm=p)
    return {
        model: Cell(figure["value"], figure.get("low"), figure.get("high"), model == best, behind.get(model))
        for model, figure in figures.items()
    }


def categories(column: Column, kind: str) -> list[tuple[str, dict[int, dict[str, Any]]]]:
    """The breakdown's rows, of official or judged scores: a category, and its figures by model."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for model, result in column.results.items():
        for name, figure in result.report["categories"].items():
            chosen = figure if kind == "official" else figure.get(kind) or {"value": None}
            if chosen["value"] is not None:
                found.setdefault(name, {})[model] = {"n": figure["n"], **chosen}
    return list(found.items())


def question_rows(column: Column) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """The column's questions as its first result has them, and beside each every model's row in the column's order."""
    by_id = [{row["id"]: row for row in result.rows} for result in column.results.values()]
    rows = column.first.rows
    return rows, [[rows_of[row["id"]] for rows_of in by_id] for row in rows]


def worth(row: dict[str, Any]) -> float | None:
    """Of an answer, 0 to 1: what the official scorer gives, or a judge where there is no official scorer."""
    return row["official"] if row["official"] is not None else row.get("judged")


def models_differ(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether models' answers to a question are worth differently."""
    return len({worth(row) for row in rows}) > 1
