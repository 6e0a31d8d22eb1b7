"""Training progress: bars and the metrics of the last step on a terminal, plain lines elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmdora.core.console import Pace, print_line, progress_bar

SPEED_PERIOD = 3600  # seconds of steps for the remaining time; a step of a large model may take a minute


def training_display(console: Console, steps: int, done: int = 0) -> TrainingDisplay:
    """Return the display that fits the console. `done` of `steps` were taken before a run was resumed."""
    return LiveDisplay(console, steps, done) if console.is_interactive else PlainDisplay(console, steps, done)


class TrainingDisplay(ABC):
    """Shows a run while it trains."""

    @abstractmethod
    def step(self, line: Mapping[str, Any]) -> None:
        """Show a step, given as its line of metrics.jsonl."""

    @abstractmethod
    def bar(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show the progress of an evaluation inside the block; yields `advance(n)`."""

    @abstractmethod
    def close(self) -> None:
        """End the display, also when training stops with an error."""


class PlainDisplay(TrainingDisplay):
    """Plain lines for a log file: the first step, one every 10 seconds, and the last step."""

    def __init__(self, console: Console, steps: int, done: int = 0):
        self.console, self.pace = console, Pace(steps, done)

    def step(self, line: Mapping[str, Any]) -> None:
        if self.pace.is_due(line["step"]):
            metrics = [loss(line), learning_rate(line), *speeds(line)]
            step = f"step {line['step']}/{self.pace.total}"
            print_line(self.console, [step, *metrics, self.pace.time(line["step"])])

    def bar(self, label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return progress_bar(self.console, label, total)

    def close(self) -> None:
        pass


class LiveDisplay(TrainingDisplay):
    """Bars that stay at the bottom of the terminal, with the metrics of the last step between them."""

    def __init__(self, console: Console, steps: int, done: int = 0):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.training = Progress(
            *columns, TextColumn("eta"), TimeRemainingColumn(), console=console, speed_estimate_period=SPEED_PERIOD
        )
        self.task = self.training.add_task("training", total=steps, completed=done)
        self.evaluation = Progress(*columns, console=console)
        self.metrics = WrappedMetrics()
        self.live = Live(Group(self.training, self.metrics, self.evaluation), console=console, refresh_per_second=4)
        self.live.start()

    def step(self, line: Mapping[str, Any]) -> None:
        self.training.update(self.task, completed=line["step"])
        self.metrics.texts = all_metrics(line)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        task = self.evaluation.add_task(label, total=total)
        yield lambda n: self.evaluation.advance(task, n)
        self.evaluation.remove_task(task)

    def close(self) -> None:
        self.live.stop()


class WrappedMetrics:
    """Metrics in as many lines as the terminal's width needs; a metric is never split over two lines."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[str]:
        line = ""
        for text in self.texts:
            longer = f"{line} · {text}" if line else text
            if line and len(longer) > options.max_width:
                yield line
                longer = text
            line = longer
        yield line


def all_metrics(line: Mapping[str, Any]) -> list[str]:
    """Return the metrics of a line of metrics.jsonl as short texts."""
    share = line["seconds_waiting_for_data"] / line["seconds"] if line["seconds"] else 0.0
    return [
        loss(line),
        learning_rate(line),
        *speeds(line),
        f"{line['frames_per_second']:,.1f} frames/s",
        *([] if line["mfu"] is None else [f"MFU {line['mfu']:.1%}"]),
        f"{'GPU mem' if torch.cuda.is_available() else 'memory'} {line['memory_gib']:.1f} GiB",
        f"data wait {share:.1%}",
    ]


def loss(line: Mapping[str, Any]) -> str:
    return "loss not finite" if line["loss"] is None else f"loss {line['loss']:.3f}"


def learning_rate(line: Mapping[str, Any]) -> str:
    """Return one rate if all parts have the same, otherwise the rate of each part."""
    rates = {part: f"{rate:.1e}" for part, rate in line["learning_rates"].items()}
    if len(set(rates.values())) == 1:
        return f"lr {next(iter(rates.values()))}"
    return "lr " + ", ".join(f"{part} {rate}" for part, rate in rates.items())


def speeds(line: Mapping[str, Any]) -> list[str]:
    return [f"{line['tokens_per_second']:,.0f} tokens/s", f"{line['samples_per_second']:,.1f} samples/s"]
