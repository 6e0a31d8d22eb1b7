"""Compare two results, runs or folders of results: pair them by benchmark, then compare them question by question."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.compare import Comparison, adjusted, compare, flipped, matched, setting_differences
from eval.results import find_results, read_result, without_garbage_collection
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairedComparison:
    """One kind of score of one benchmark, with examples of questions whose score differs."""

    comparison: Comparison
    examples: dict[str, list[dict[str, Any]]]  # better_in_a, better_in_b


@dataclass(frozen=True)
class ResultComparison:
    a: Path
    b: Path
    pairs: list[PairedComparison]
    differences: dict[str, list[str]]  # by benchmark: settings that differ and do not prevent a comparison

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(pair.comparison) | {"examples": pair.examples} for pair in self.pairs]
        return {"a": str(self.a), "b": str(self.b), "comparisons": rows, "also_unlike": self.differences}


@without_garbage_collection()
def compare_results(a: Path, b: Path) -> ResultComparison:
    """Compare every benchmark that both sides have; p-values are adjusted over them (Holm).

    Raises UserError if no benchmark is on both sides, or if a pair did not answer the same questions in the same way.
    """
    sides = [[read_result(folder) for folder in find_results(path)] for path in (a, b)]
    pairs, unmatched = matched(*sides)
    if not pairs:
        names = [", ".join(f"{r.name} ({r.benchmark})" for r in side) for side in sides]
        raise UserError(f"no common benchmark: {a} has {names[0]}; {b} has {names[1]}")
    for result in unmatched:
        log.warning("%s: the other side has no %s; skipped", result.folder, result.name)
    made = [(pair, comparison) for pair in pairs for comparison in compare(*pair)]
    comparisons = adjusted([comparison for _, comparison in made])
    examples = [flipped(*pair, comparison.kind) for pair, comparison in made]
    paired = [PairedComparison(*both) for both in zip(comparisons, examples, strict=True)]
    return ResultComparison(a, b, paired, {pair[0].name: setting_differences(*pair) for pair in pairs})
