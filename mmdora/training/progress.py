"""What a run shows on the terminal while it trains: a bar, the figures of the last step, and a bar of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SPEED_PERIOD = 3600  # seconds of steps that the time left is told from; a step of a large model may take a minute


class TrainingDisplay:
    """Lines that stay at the bottom of the terminal. The figures wrap between them, and never inside one."""

    def __init__(self, console: Console, steps: int, done: int = 0):
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.training = Progress(
            *columns, TimeRemainingColumn(), TextColumn("left"), console=console, speed_estimate_period=SPEED_PERIOD
        )
        self.task = self.training.add_task("training", total=steps, completed=done)
        self.evaluation = Progress(*columns, console=console)
        self.figures = Figures()
        self.live = Live(Group(self.training, self.figures, self.evaluation), console=console, refresh_per_second=4)
        self.live.start()

    def step(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        self.training.update(self.task, completed=line["step"])
        self.figures.shown = figures(line)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar below the others, gone when the block ends; yields its `advance(n)`."""
        task = self.evaluation.add_task(label, total=total)
        yield lambda n: self.evaluation.advance(task, n)
        self.evaluation.remove_task(task)

    def close(self) -> None:
        """Leave the terminal as it was, also when training stops on an error."""
        self.live.stop()
        if not self.console.is_interactive:
            self.console.print()


class Figures:
    """Figures in as many lines as the terminal's width wants; none is broken in two."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[str]:
        line = ""
        for figure in self.shown:
            longer = f"{line} · {figure}" if line else figure
            if line and len(longer) > options.max_width:
                yield line
                longer = figure
            line = longer
        yield line


def figures(line: Mapping[str, Any]) -> list[str]:
    """The figures of a line of metrics.jsonl, for people."""
    rates = line["learning_rates"]
    told = ", ".join(f"{part} {rate:.2g}" for part, rate in rates.items())
    if len(set(rates.values())) == 1:
        told = f"{next(iter(rates.values())):.2g}"
    share = line["seconds_waiting_for_data"] / line["seconds"] if line["seconds"] else 0.0
    shown = [
        f"loss {line['loss']:.3f}" if line["loss"] is not None else "loss not finite",
        f"rate {told}",
        f"{line['tokens_per_second']:,.0f} tokens/s",
        f"{line['samples_per_second']:,.1f} samples/s",
        f"{line['frames_per_second']:,.1f} frames/s",
        f"{line['memory_gib']:.1f} GiB",
        f"{share:.1%} waiting for data",
    ]
    if line["mfu"] is not None:
        shown.insert(5, f"MFU {line['mfu']:.1%}")
    return shown
