"""Tables that commands print."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from mmdora.adapters.injection import InjectionReport
from mmdora.core.console import make_table
from mmdora.core.deepspeed import numel
from mmdora.core.run_directory import RunDir


def estimate(scores: dict[str, float | None] | None) -> str:
    """Format a score with its 95% interval, `98.7 [97.4, 99.7]`; without the interval if it is unknown."""
    if scores is None or scores["value"] is None:
        return "–"
    interval = "" if scores["low"] is None else f" [{scores['low']:.1f}, {scores['high']:.1f}]"
    return f"{scores['value']:.1f}{interval}"


def results_table(reports: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> Table:
    """Return a table with a row per benchmark, from pairs of reports: (after training, before it or None).

    Columns: the scores, `baseline` (the score of always giving the most frequent answer), and `unparsed` (percentage
    of answers that could not be parsed). Columns that would be empty are left out.
    """
    has_before = any(before is not None for _, before in reports)
    has_judged = any(after["scores"].get("judged") for after, _ in reports)
    has_unparsed = any(after["unparsed_rate"] for after, _ in reports)
    columns = ["before", "after"] if has_before else ["score"]
    columns += [*(["judged"] if has_judged else []), "baseline", *(["unparsed"] if has_unparsed else [])]
    table = make_table("scores, with 95% intervals", "benchmark", "n", *columns)
    for after, before in reports:
        cells = [estimate(after["scores"]["official"])]
        if has_before:
            cells.insert(0, estimate(before["scores"]["official"] if before else None))
        if has_judged:
            cells.append(estimate(after["scores"].get("judged")))
        baseline, unparsed = after["majority_baseline"], after["unparsed_rate"]
        cells.append("–" if baseline is None else f"{baseline:.1f}")
        if has_unparsed:
            cells.append("–" if unparsed is None else f"{100 * unparsed:.1f}")
        table.add_row(after["name"], str(after["n"]), *cells)
    return table


def show_adapters(console: Console, report: InjectionReport) -> None:
    """Print the method of each part, how many of its modules are adapted, and its trainable parameters."""
    table = make_table("adapters", "part", "method", "adapted", "trainable params", "all params", "%")
    for part in report.parts:
        adapted = f"{len(part.modules)}/{len(part.modules) + len(part.skipped)}"
        share = f"{100 * part.trainable / part.total:.2f}"
        table.add_row(part.name, part.method, adapted, f"{part.trainable:,}", f"{part.total:,}", share)
    table.add_row("model", "", "", f"{report.trainable:,}", f"{report.total:,}", f"{report.percent:.2f}")
    console.print(table)


def show_groups(console: Console, groups: list[dict[str, Any]]) -> None:
    """Print the optimizer's parameter groups: learning rate and weight decay."""
    table = make_table("optimizer", "part", "params", "lr", "weight decay")
    counts: Counter[tuple[str, float, float]] = Counter()
    for group in groups:
        counts[group["name"], group["lr"], group["weight_decay"]] += sum(numel(p) for p in group["params"])
    for (part, rate, decay), count in sorted(counts.items()):
        table.add_row(part, f"{count:,}", f"{rate:.1e}", f"{decay:g}")
    console.print(table)


def show_best(console: Console, run_dir: RunDir) -> None:
    """Print which step had the best adapter (`training.best`), and how to use it."""
    if not run_dir.best.is_dir():
        return
    best = json.loads((run_dir.best / "best.json").read_text(encoding="utf-8"))
    console.print(
        f"The best {best['metric']} was {best['value']:.4g}, after step {best['step']}. Its adapter is in "
        f"{run_dir.best}/adapter; eval, merge and chat take it in place of the run:\n"
        f"  mmdora eval {run_dir.best}/adapter --benchmark NAME --data DIR --out DIR",
        soft_wrap=True,
    )
