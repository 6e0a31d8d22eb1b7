"""`mmdora compare`: two models on the same benchmarks, paired question by question."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.compare import EXACT, Comparison, adjusted, compare, flipped, matched, setting_differences
from eval.results import Result, find_results, read_result, without_garbage_collection
from mmdora.core.console import make_console, make_table
from mmdora.core.errors import UserError
from mmdora.core.registry import import_plugins

log = logging.getLogger(__name__)


@without_garbage_collection()
def run(a: Path, b: Path, as_json: bool, plugins: list[str]) -> None:
    import_plugins(plugins)
    sides = [[read_result(folder) for folder in find_results(path)] for path in (a, b)]
    pairs, alone = matched(*sides)
    if not pairs:
        has = [", ".join(f"{r.name} ({r.benchmark})" for r in side) for side in sides]
        raise UserError(f"no benchmark is in both: {a} has {has[0]}, {b} has {has[1]}")
    for result in alone:
        log.warning("%s: the other side has no %s; it is left out", result.folder, result.name)
    made = [(pair, one) for pair in pairs for one in compare(*pair)]
    comparisons = adjusted([one for _, one in made])
    examples = [flipped(*pair, one.kind) for pair, one in made]
    notes = {pair[0].name: setting_differences(*pair) for pair in pairs}
    if as_json:
        rows = [asdict(one) | {"examples": shown} for one, shown in zip(comparisons, examples, strict=True)]
        document = {"a": str(a), "b": str(b), "comparisons": rows, "also_unlike": notes}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    console = make_console()
    console.print(f"A: {a}\nB: {b}\n", soft_wrap=True)
    show(console, comparisons)
    for (pair, one), shown in zip(made, examples, strict=True):
        if one.kind != "strict":
            show_counts(console, pair, one, shown)
    for name, lines in notes.items():
        for line in lines:
            console.print(f"Unlike in {name}: {line}", soft_wrap=True)


def show(console: Console, comparisons: Sequence[Comparison]) -> None:
    """Official and judged scores; the strict ones are in the JSON."""
    table = make_table("B against A, with 95% intervals", "benchmark", "n", "A", "B", "B - A", "p", "p, Holm")
    for one in comparisons:
        if one.kind != "strict":
            name = one.name if one.kind == "official" else f"{one.name}, {one.kind}"
            scores = f"{one.a:.1f}", f"{one.b:.1f}"
            table.add_row(name, str(one.n), *scores, change(one), chance(one.p), chance(one.p_holm))
    console.print(table)


def show_counts(console: Console, pair: tuple[Result, Result], one: Comparison, shown: Mapping[str, Any]) -> None:
    """How many answers flipped, by which test p is, and some of the questions."""
    counts = one.counts
    told = (
        f"{one.name}, {one.kind}: both right {counts['both_right']}, only A {counts['only_a']}, "
        f"only B {counts['only_b']}, both wrong {counts['both_wrong']}. p by {one.test}"
    )
    if one.test != EXACT and one.mcnemar_p is not None:
        told += (
            f" ({one.n} questions in {one.clusters} clusters, as on one image; McNemar's test, which takes questions "
            f"to be independent, has {chance(one.mcnemar_p)})"
        )
    console.print(told, soft_wrap=True)
    for name, side in (("better_in_a", "A"), ("better_in_b", "B")):
        for row in shown[name]:
            references = " / ".join(dict.fromkeys(row["references"]))
            console.print(
                f"  better in {side}: {row['id']}: {_short(row['question'])} ({_short(references)})  "
                f"A: {_short(row['response_a'])}  B: {_short(row['response_b'])}",
                soft_wrap=True,
            )


def change(one: Comparison) -> str:
    """`+1.2 [0.3, 2.1]`"""
    interval = "" if one.low is None else f" [{one.low:.1f}, {one.high:.1f}]"
    return f"{one.difference:+.1f}{interval}"


def chance(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _short(text: str, longest: int = 60) -> str:
    line = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))  # a terminal obeys control codes
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
