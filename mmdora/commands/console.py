"""What the commands share on the terminal: one console that only rank 0 speaks on, tables, and quieter libraries."""

from __future__ import annotations

import importlib
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmdora.adapters.injection import InjectionReport
from mmdora.core.deepspeed import numel
from mmdora.core.errors import UserError
from mmdora.core.run_directory import RunDir


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
    return Console(quiet=not is_main(), highlight=False, markup=False)  # file names may hold brackets


def import_plugins(names: list[str]) -> None:
    """Import the modules that register what a config then names. Raises UserError for one that cannot be found."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins: cannot import {name!r} ({error})") from error


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that results go into. Raises UserError that names the option where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder {folder} ({error.strerror})") from error


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


def estimate(scores: dict[str, float | None] | None) -> str:
    """`98.7 [97.4, 99.7]`; the figure alone where nothing is known of its interval"""
    if scores is None or scores["value"] is None:
        return "–"
    interval = "" if scores["low"] is None else f" [{scores['low']:.1f}, {scores['high']:.1f}]"
    return f"{scores['value']:.1f}{interval}"


def results_table(reports: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> Table:
    """A row a benchmark: the score before, where there is one, and now; what one constant answer would score; and how
    many percent of the answers could not be parsed, where there are such."""
    earlier = any(before is not None for _, before in reports)
    judged = any(after["scores"].get("judged") for after, _ in reports)
    odd = any(after["unparsed_rate"] for after, _ in reports)
    columns = ["before", "after"] if earlier else ["score"]
    columns += [*(["judged"] if judged else []), "commonest", *(["unparsed"] if odd else [])]
    table = make_table("scores, with 95% intervals", "benchmark", "n", *columns)
    for after, before in reports:
        shown = [estimate(after["scores"]["official"])]
        if earlier:
            shown.insert(0, estimate(before["scores"]["official"] if before else None))
        if judged:
            shown.append(estimate(after["scores"].get("judged")))
        baseline, unparsed = after["majority_baseline"], after["unparsed_rate"]
        shown.append("–" if baseline is None else f"{baseline:.1f}")
        if odd:
            shown.append("–" if unparsed is None else f"{100 * unparsed:.1f}")
        table.add_row(after["name"], str(after["n"]), *shown)
    return table


def show_adapters(console: Console, report: InjectionReport) -> None:
    """What was adapted, and what was not."""
    table = make_table("what is tuned", "part", "method", "modules", "left", "trainable", "of", "share")
    for part in report.parts:
        share = f"{100 * part.trainable / part.total:.2f}%"
        counts = [str(len(part.modules)), str(len(part.skipped)), f"{part.trainable:,}", f"{part.total:,}"]
        table.add_row(part.name, part.method, *counts, share)
    table.add_row("all", "", "", "", f"{report.trainable:,}", f"{report.total:,}", f"{report.percent:.2f}%")
    console.print(table)


def show_groups(console: Console, groups: list[dict[str, Any]]) -> None:
    """How fast each part learns: the optimizer's groups."""
    table = make_table("how it learns", "part", "parameters", "learning rate", "weight decay")
    counts: Counter[tuple[str, float, float]] = Counter()
    for group in groups:
        counts[group["name"], group["lr"], group["weight_decay"]] += sum(numel(p) for p in group["params"])
    for (part, rate, decay), count in sorted(counts.items()):
        table.add_row(part, f"{count:,}", f"{rate:.3g}", f"{decay:g}")
    console.print(table)


def show_best(console: Console, run_dir: RunDir) -> None:
    """Which step's adapter was the best, and how it is used in place of the last."""
    if not run_dir.best.is_dir():
        return
    best = json.loads((run_dir.best / "best.json").read_text(encoding="utf-8"))
    console.print(
        f"The best of {best['metric']} was {best['value']:.4g}, after step {best['step']}; its adapter is in "
        f"{run_dir.best}/adapter, which eval, merge and chat take in the run's place:\n"
        f"  mmdora eval {run_dir.best}/adapter --benchmark NAME --data DIR --out DIR",
        soft_wrap=True,
    )
