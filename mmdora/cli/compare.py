"""`mmdora compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdora.cli.app import JsonOutput, Plugins, app

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from eval.compare import Comparison
    from eval.compare_results import PairedComparison


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="RESULT_A", help="A result, a run, or a folder of results.")],
    b: Annotated[Path, typer.Argument(metavar="RESULT_B", help="The result, run or folder to compare with it.")],
    as_json: JsonOutput = False,
    plugin: Plugins = None,
) -> None:
    """Compare two models question by question.

    Tests whether the difference may be chance (exact McNemar or paired cluster bootstrap, Holm over benchmarks).
    """
    from eval.results import find_results
    from mmdora.core.registry import import_plugins

    import_plugins(plugin or [])
    for path in (a, b):
        find_results(path)

    from eval.compare_results import compare_results
    from mmdora.core.console import make_console

    compared = compare_results(a, b)
    if as_json:
        sys.stdout.write(json.dumps(compared.to_json(), indent=2) + "\n")
        return
    console = make_console()
    shown = [pair for pair in compared.pairs if pair.comparison.kind != "strict"]  # strict scores: in the JSON only
    console.print(f"A: {a}\nB: {b}\n", soft_wrap=True)
    console.print(_table([pair.comparison for pair in shown]))
    for pair in shown:
        for line in _describe_flips(pair):
            console.print(line, soft_wrap=True)
    for name, lines in compared.differences.items():
        for line in lines:
            console.print(f"Differs in {name}: {line}", soft_wrap=True)


def _table(comparisons: Sequence[Comparison]) -> Table:
    from mmdora.core.console import make_table

    table = make_table("B compared with A, 95% intervals", "benchmark", "n", "A", "B", "B - A", "p", "p (Holm)")
    for comparison in comparisons:
        kind = "" if comparison.kind == "official" else f", {comparison.kind}"
        table.add_row(
            f"{comparison.name}{kind}",
            str(comparison.n),
            f"{comparison.a:.1f}",
            f"{comparison.b:.1f}",
            _format_difference(comparison),
            _format_p(comparison.p),
            _format_p(comparison.p_holm),
        )
    return table


def _describe_flips(pair: PairedComparison) -> list[str]:
    """Return lines with the number of answers that only one side has right, the test behind p, and some questions."""
    from eval.compare import EXACT

    comparison, counts = pair.comparison, pair.comparison.counts
    summary = (
        f"{comparison.name}, {comparison.kind}: both right {counts['both_right']}, only A {counts['only_a']}, "
        f"only B {counts['only_b']}, both wrong {counts['both_wrong']}. p by {comparison.test}"
    )
    if comparison.test != EXACT and comparison.mcnemar_p is not None:
        summary += (
            f" ({comparison.n} questions in {comparison.clusters} clusters, e.g. of one image; McNemar's test, which "
            f"assumes independent questions, gives {_format_p(comparison.mcnemar_p)})"
        )
    lines = [summary]
    for side, examples in (("A", pair.examples["better_in_a"]), ("B", pair.examples["better_in_b"])):
        for example in examples:
            references = " / ".join(dict.fromkeys(example["references"]))
            lines.append(
                f"  better in {side}: {example['id']}: {_shorten(example['question'])} ({_shorten(references)})  "
                f"A: {_shorten(example['response_a'])}  B: {_shorten(example['response_b'])}"
            )
    return lines


def _format_difference(comparison: Comparison) -> str:
    """Format as `+1.2 [0.3, 2.1]`."""
    interval = "" if comparison.low is None else f" [{comparison.low:.1f}, {comparison.high:.1f}]"
    return f"{comparison.difference:+.1f}{interval}"


def _format_p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _shorten(text: str, max_length: int = 60) -> str:
    line = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))  # a terminal obeys control codes
    return line if len(line) <= max_length else f"{line[: max_length - 1]}…"
