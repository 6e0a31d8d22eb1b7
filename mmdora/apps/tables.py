"""The tables that commands print."""

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
