"""Compare two models' answers to the same questions, question by question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from eval.benchmarks import BENCHMARKS, Benchmark
from eval.metrics import PERCENT, Table, holm, mcnemar, paired_difference
from eval.results import Result
from eval.scoring import score_table
from mmdora.core.errors import UserError

Row = Mapping[str, Any]  # a line of scores.jsonl
KINDS = ("official", "strict", "judged")  # kinds of scores; one kind is never compared with another
CORRECT = 0.5  # the least score of an answer that counts as correct
EXACT = "exact McNemar"
BOOTSTRAP = "paired cluster bootstrap"
EXAMPLES = 5


@dataclass(frozen=True)
class Comparison:
    """How much higher one kind of score is in B than in A.

    `p` is the p-value of `test`. `p_holm` is adjusted for the benchmarks that were compared together.
    """

    name: str
    benchmark: str
    kind: str
    n: int
    clusters: int
    a: float
    b: float
    difference: float  # b - a, in the benchmark's unit
    low: float | None
    high: float | None
    test: str
    p: float
    p_holm: float
    mcnemar_p: float | None  # None if scores are not all 0 or 1, or the headline is not their mean
    bootstrap_p: float
    counts: dict[str, int]  # both_right, only_a, only_b, both_wrong


def compare(a: Result, b: Result) -> list[Comparison]:
    """Compare every kind of score that both results have.

    Raises UserError that lists the differences if the two did not answer the same questions under the same conditions.
    """
    if reasons := differences(a, b):
        listed = "\n".join(f"  {reason}" for reason in reasons)
        raise UserError(f"{a.folder} and {b.folder} cannot be compared question by question:\n{listed}")
    kinds = [kind for kind in KINDS if has_scores(a, kind) and has_scores(b, kind)]
    if not kinds:
        raise UserError(f"{a.folder} and {b.folder} have no scores to compare: the answers to {a.name} are not public")
    return [made for kind in kinds if (made := compare_kind(a, b, kind)) is not None]


def has_scores(result: Result, kind: str) -> bool:
    """Return whether every question has a score of this kind."""
    figure = result.report["scores"].get(kind) or {"value": None}
    return figure["value"] is not None and all(row.get(kind) is not None for row in result.rows)


def compare_kind(a: Result, b: Result, kind: str) -> Comparison | None:
    """Compare one kind of score. Return None if a headline is undefined, such as a share of zero answers.

    McNemar's test is exact for scores of 0 and 1 and assumes independent questions. If several questions share an image
    or video they are not independent, and the paired bootstrap over clusters is the test.
    """
    benchmark, rows_b = BENCHMARKS[a.benchmark](), {row["id"]: row for row in b.rows}
    pairs = [(row, rows_b[row["id"]]) for row in a.rows]
    clusters = [row["cluster"] for row in a.rows]  # B may have the same files under other paths
    table_a, table_b = (_table(rows, clusters, kind) for rows in zip(*pairs, strict=True))
    is_mean = kind == "judged" or benchmark.headline_is_mean
    headline = partial(Benchmark.headline, benchmark) if is_mean else benchmark.headline
    statistic = partial(headline, kind=kind)
    paired = paired_difference(table_a, table_b, statistic, PERCENT if kind == "judged" else benchmark.bounds)
    if paired is None:
        return None
    counts = count([(x[kind], y[kind]) for x, y in pairs])
    exact = None
    if is_mean and all(row[kind] in (0, 1) for pair in pairs for row in pair):
        exact = mcnemar(counts["only_a"], counts["only_b"])
    independent = table_a.clusters == len(pairs)
    test, p = (EXACT, exact) if exact is not None and independent else (BOOTSTRAP, paired.p)
    return Comparison(
        name=a.name,
        benchmark=a.benchmark,
        kind=kind,
        n=len(pairs),
        clusters=table_a.clusters,
        a=float(statistic(table_a.whole())[0]),
        b=float(statistic(table_b.whole())[0]),
        difference=paired.value,
        low=paired.low,
        high=paired.high,
        test=test,
        p=p,
        p_holm=p,
        mcnemar_p=exact,
        bootstrap_p=paired.p,
        counts=counts,
    )


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with `p_holm` adjusted over all comparisons of each kind."""
    result = list(comparisons)
    for kind in KINDS:
        places = [i for i, comparison in enumerate(result) if comparison.kind == kind]
        for i, p in zip(places, holm([result[i].p for i in places]), strict=True):
            result[i] = replace(result[i], p_holm=p)
    return result


def differences(a: Result, b: Result, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """Return the reasons why two results cannot be compared. Entries missing from a receipt count as equal."""
    if a.benchmark != b.benchmark:
        return [f"benchmark: {a.benchmark} and {b.benchmark}"]
    receipt_a, receipt_b = a.receipt, b.receipt
    reasons = []
    for key in ("scorer_version", "judge", "prompt_template"):
        x, y = receipt_a.get(key), receipt_b.get(key)
        if x != y and None not in (x, y):
            reasons.append(f"{key}: {x!r} and {y!r}")
    same_ids = {row["id"] for row in a.rows} == {row["id"] for row in b.rows}
    if same_ids and receipt_a.get("question_set") == receipt_b.get("question_set") is not None:
        return reasons
    splits = BENCHMARKS[a.benchmark].splits
    subsets = [(r.get("split") or next(iter(splits), None), r.get("limit")) for r in (receipt_a, receipt_b)]
    for key, x, y in zip(("split", "limit"), *subsets, strict=True):
        if x != y:
            reasons.append(f"{key}: {x or 'none'} and {y or 'none'}")
    return reasons + _question_differences(a, b, names)


def _question_differences(a: Result, b: Result, names: tuple[str, str]) -> list[str]:
    rows_a, rows_b = ({row["id"]: row for row in result.rows} for result in (a, b))
    reasons = []
    for where, ids in zip(names, (rows_a.keys() - rows_b.keys(), rows_b.keys() - rows_a.keys()), strict=True):
        if ids:
            reasons.append(f"questions: {len(ids)} only in {where}, such as {', '.join(map(repr, sorted(ids)[:3]))}")
    shared = rows_a.keys() & rows_b.keys()
    parts: dict[str, Callable[[Row], Any]] = {
        "question": lambda row: row["question"],
        "references": lambda row: row["references"],
        "media": lambda row: [path.replace("\\", "/").rpartition("/")[2] for path in row["media"]],
    }
    for key, part in parts.items():
        if ids := {i for i in shared if part(rows_a[i]) != part(rows_b[i])}:
            first = min(ids)
            pair = f"{part(rows_a[first])!r:.80} and {part(rows_b[first])!r:.80}"
            reasons.append(f"{key}: {len(ids)} questions differ, such as {first!r}: {pair}")
    return reasons or ["question_set: earlier turns of the conversations differ, or a receipt has no question_set"]


def _table(rows: Sequence[Row], clusters: Sequence[str], kind: str) -> Table:
    if kind == "judged":
        return Table({kind: [row[kind] for row in rows], "n": [1.0] * len(rows)}, clusters)
    return score_table(rows, clusters)


def count(pairs: Sequence[tuple[float, float]]) -> dict[str, int]:
    """Count the questions that both models, one of them or neither answer correctly."""
    correct = [(x >= CORRECT, y >= CORRECT) for x, y in pairs]
    names = {"both_right": (True, True), "only_a": (True, False), "only_b": (False, True), "both_wrong": (False, False)}
    return {name: correct.count(outcome) for name, outcome in names.items()}


def flipped(a: Result, b: Result, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Return example questions with a higher score in A, and in B: those whose scores differ most come first."""
    rows_b = {row["id"]: row for row in b.rows}
    pairs = [(row, rows_b[row["id"]]) for row in a.rows]
    examples = {}
    for name, sign in (("better_in_a", 1), ("better_in_b", -1)):
        chosen = [pair for pair in pairs if sign * (pair[0][kind] - pair[1][kind]) > 0]
        chosen.sort(key=lambda pair: -abs(pair[0][kind] - pair[1][kind]))
        examples[name] = [
            {
                **{key: x[key] for key in ("id", "question", "media", "references")},
                "a": x[kind],
                "b": y[kind],
                "response_a": x["response"],
                "response_b": y["response"],
            }
            for x, y in chosen[:EXAMPLES]
        ]
    return examples


def matched(a: Sequence[Result], b: Sequence[Result]) -> tuple[list[tuple[Result, Result]], list[Result]]:
    """Return the pairs of results with the same name and benchmark, and the results without a partner.

    A single result on each side is a pair whatever its name.
    """
    if len(a) == len(b) == 1:
        return [(a[0], b[0])], []
    by_name_a, by_name_b = ({(r.name, r.benchmark): r for r in results} for results in (a, b))
    pairs = [(by_name_a[key], by_name_b[key]) for key in by_name_a if key in by_name_b]
    unmatched = [r for key, r in (by_name_a | by_name_b).items() if (key in by_name_a) != (key in by_name_b)]
    return pairs, unmatched


def setting_differences(a: Result, b: Result) -> list[str]:
    """Return differences in settings that do not prevent a comparison but should be printed beside it."""
    lines = []
    for key in ("num_frames", "video_reader", "decoding", "dtype"):
        x, y = a.receipt.get(key), b.receipt.get(key)
        if x != y and None not in (x, y):
            lines.append(f"{key}: {x} and {y}")
    if missing := [name for name, r in (("A", a), ("B", b)) if r.receipt.get("prompt_template") is None]:
        lines.append(f"the prompt of {' and '.join(missing)} is unknown: not generated by `mmdora eval`")
    return lines
