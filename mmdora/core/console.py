"""Terminal output that commands share: rank 0's console, tables, and progress on a terminal or in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mmdora.core.distributed import is_main

PERIOD = 10.0  # seconds between two progress lines, if the output is not a terminal
MB = 10**6


def make_console() -> Console:
    """Return a console that prints in rank 0 only."""
    return Console(quiet=not is_main(), highlight=False, markup=False)  # file names may contain brackets


@contextmanager
def progress_bar(console: Console, label: str, total: int, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Show the progress of `total` items or bytes; yields `advance(n)`.

    A terminal gets a bar. Other output (a pipe, nohup, Slurm, CI) gets a plain line at the start, every PERIOD seconds
    and at the end.
    """
    if not console.is_interactive:
        yield ProgressLines(console, label, total, in_bytes).advance
        return
    count: ProgressColumn = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn(label, markup=False), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)


class ProgressLines:
    """Progress as plain lines, such as `counting  120/400  eta 0:41`."""

    def __init__(self, console: Console, label: str, total: int, in_bytes: bool = False):
        self.console, self.label, self.in_bytes = console, label, in_bytes
        self.done, self.pace = 0, Pace(total)
        self.advance(0)

    def advance(self, n: int) -> None:
        self.done += n
        if self.pace.is_due(self.done):
            done, total = self.done, self.pace.total
            count = f"{done / MB:,.0f}/{total / MB:,.0f} MB" if self.in_bytes else f"{done:,}/{total:,}"
            print_line(self.console, [self.label, count, self.pace.time(done)])


class Pace:
    """Decides when the next progress line is due, and estimates the remaining time.

    `done` of `total` items were finished before the start, as in a run that is resumed.
    """

    def __init__(self, total: int, done: int = 0):
        self.total, self.first = total, done
        self.start = time.monotonic()
        self.printed: float | None = None  # time of the last line
        self.ended = False

    def is_due(self, done: int) -> bool:
        """Return whether to print a line now: the first one, one every PERIOD seconds, and the last one, once."""
        now = time.monotonic()
        if self.ended or (done < self.total and self.printed is not None and now - self.printed < PERIOD):
            return False
        self.printed, self.ended = now, done >= self.total
        return True

    def time(self, done: int) -> str:
        """Return the estimated remaining time, or the time taken if all is done; empty if nothing is known yet."""
        seconds = time.monotonic() - self.start
        if done >= self.total:
            return f"in {duration(seconds)}"
        if done <= self.first:
            return ""
        return f"eta {duration(seconds / (done - self.first) * (self.total - done))}"


def print_line(console: Console, fields: list[str]) -> None:
    """Print the non-empty fields in one line, however narrow the terminal is. rich flushes each line."""
    console.print("  ".join(field for field in fields if field), soft_wrap=True)


def duration(seconds: float) -> str:
    """Format seconds as `2:41` or `1:02:41`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def make_table(title: str, *columns: str) -> Table:
    """Return an empty table. It has no box, so that its numbers fit into 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table
