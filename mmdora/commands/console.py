"""What the commands share on the terminal: one console that only rank 0 speaks on, tables, and quieter libraries."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmdora.errors import UserError


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def make_console() -> Console:
    """Rank 0's console; silent in the other processes. Libraries' progress bars and notes are turned down."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch|deepspeed|transformers|accelerate")
    return Console(quiet=not is_main(), highlight=False)


def import_plugins(names: list[str]) -> None:
    """Import the modules that register what a config then names. Raises UserError for one that cannot be found."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins: cannot import {name!r} ({error})") from error


@contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Any]:
    """A bar that yields its `advance(n)`."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)


def percent(scores: dict[str, float] | None) -> str:
    """`98.7% [97.4, 99.7]`"""
    if scores is None:
        return "–"
    return f"{scores['value']:.1f}% [{scores['low']:.1f}, {scores['high']:.1f}]"


def results_table(reports: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> Table:
    """After and before, with 95% intervals, a row a benchmark."""
    table = Table(title="scores, with 95% intervals", title_justify="left")
    for column in ("benchmark", "questions", "before", "after", "commonest answer"):
        table.add_column(column)
    for after, before in reports:
        baseline = after["majority_baseline"]
        table.add_row(
            after["name"],
            str(after["n"]),
            percent(before["scores"]["official"] if before else None),
            percent(after["scores"]["official"]),
            "–" if baseline is None else f"{baseline:.1f}%",
        )
    return table
