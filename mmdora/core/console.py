"""What the commands share on the terminal: one console that only rank 0 speaks on, tables, and quieter libraries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmdora.core.deepspeed import quiet_deepspeed
from mmdora.core.distributed import is_main


def make_console() -> Console:
    """Rank 0's console; silent in the other processes. Libraries' progress bars and notes are turned down."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    quiet_deepspeed()
    warnings.filterwarnings("ignore", module=r"torch|deepspeed|transformers|accelerate")
    return Console(quiet=not is_main(), highlight=False, markup=False)  # file names may hold brackets


@contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Any]:
    """A bar that yields its `advance(n)`."""
    columns = (TextColumn(label, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)


def make_table(title: str, *columns: str) -> Table:
    """A table with rules under its head only, which stays inside 80 columns where a boxed one wraps its figures."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table
