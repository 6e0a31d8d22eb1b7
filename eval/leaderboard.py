"""Arrange many results as a table of models and benchmarks, and test each model against the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.compare import Comparison, compare_kind, differences, has_scores
from eval.metrics import holm
from eval.results import Result

SIGNIFICANCE = 0.05  # p-values below it count as a difference


@dataclass
class Column:
    """One benchmark's comparable results, by model. Results with another prompt, for example, get another column."""

    name: str
    benchmark: str
    results: dict[int, Result] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)  # why it cannot join the first column of its name

    @property
    def first(self) -> Result:
        return next(iter(self.results.values()))


@dataclass(frozen=True)
class Cell:
    """A model's score, and its comparison with the best of the column (`behind`, None for the best itself)."""

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
    """Arrange (name, result) pairs as a table.

    A result belongs to the model with its given name, or else its digest of weights. If that model already has a result
    in the column, the new one is another model, with a number after its name.
    """
    models: list[tuple[str, str]] = []  # (key, displayed name)
    columns: list[Column] = []
    for name, result in named:
        column = _column(columns, result)
        key = name or str(result.receipt.get("weights") or result.folder.resolve())
        model = (key, name or model_name(result))
        same = [i for i, other in enumerate(models) if other == model and i not in column.results]
        if not same:
            same = [len(models)]
            models.append(model)
        column.results[same[0]] = result
    return Board(_unique([displayed for _, displayed in models]), columns)


def _column(columns: list[Column], result: Result) -> Column:
    """Return the column in which the result can be compared, or a new one."""
    for column in columns:
        if column.benchmark == result.benchmark and not differences(column.first, result):
            return column
    earlier = {column.name: column for column in columns}
    if result.name in earlier:
        name = _numbered(result.name, set(earlier))
        reasons = differences(earlier[result.name].first, result, (result.name, name))
        columns.append(Column(name, result.benchmark, differences=reasons))
    else:
        columns.append(Column(result.name, result.benchmark))
    return columns[-1]


def _numbered(name: str, taken: set[str]) -> str:
    return next(f"{name} ({i})" for i in range(2, len(taken) + 3) if f"{name} ({i})" not in taken)


def _unique(names: Sequence[str]) -> list[str]:
    """Return the names, with a number after each that occurred before."""
    unique: list[str] = []
    for name in names:
        unique.append(_numbered(name, set(unique)) if name in unique else name)
    return unique


def model_name(result: Result) -> str:
    """Return the target of `mmdora eval`, else the run that holds the result, else the folder's name."""
    folder = result.folder.resolve()
    if target := result.receipt.get("target"):
        return Path(str(target)).name or str(target)
    if folder.parent.name == "eval":
        return folder.parent.parent.name
    if (folder.parent.name, folder.parent.parent.name) == ("before", "eval"):
        return f"{folder.parent.parent.parent.name}, before"
    return folder.parent.name if folder.name in (result.name, result.benchmark) else folder.name


def cells(column: Column, kind: str) -> dict[int, Cell]:
    """Return the column's scores of one kind by model, each tested against the best (Holm over the column).

    The result is empty if the answers are not public, or nothing was judged.
    """
    scored = {model: result for model, result in column.results.items() if has_scores(result, kind)}
    figures = {model: result.report["scores"][kind] for model, result in scored.items()}
    if not figures:
        return {}
    best = max(figures, key=lambda model: figures[model]["value"])
    behind = {model: compare_kind(scored[best], scored[model], kind) for model in scored if model != best}
    tested = {model: comparison for model, comparison in behind.items() if comparison is not None}
    p_values = holm([comparison.p for comparison in tested.values()])
    for (model, comparison), p in zip(tested.items(), p_values, strict=True):
        behind[model] = replace(comparison, p_holm=p)
    return {
        model: Cell(figure["value"], figure.get("low"), figure.get("high"), model == best, behind.get(model))
        for model, figure in figures.items()
    }


def categories(column: Column, kind: str) -> list[tuple[str, dict[int, dict[str, Any]]]]:
    """Return the breakdown of official or judged scores: (category, its figures by model)."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for model, result in column.results.items():
        for name, figure in result.report["categories"].items():
            chosen = figure if kind == "official" else figure.get(kind) or {"value": None}
            if chosen["value"] is not None:
                rows.setdefault(name, {})[model] = {"n": figure["n"], **chosen}
    return list(rows.items())


def question_rows(column: Column) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Return the first result's rows, and for each of them all models' rows in the column's order."""
    by_id = [{row["id"]: row for row in result.rows} for result in column.results.values()]
    rows = column.first.rows
    return rows, [[rows_of[row["id"]] for rows_of in by_id] for row in rows]


def answer_score(row: dict[str, Any]) -> float | None:
    """Return an answer's score, 0 to 1: the official one, or the judge's if there is no official scorer."""
    return row["official"] if row["official"] is not None else row.get("judged")


def models_differ(rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether models' answers to a question have different scores."""
    return len({answer_score(row) for row in rows}) > 1
