"""Two models' answers to the same questions, held against each other question by question."""

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
KINDS = ("official", "strict", "judged")  # never held against one another
RIGHT = 0.5  # of a question's worth: partly right answers count by their better half
EXACT = "exact McNemar"
BOOTSTRAP = "paired cluster bootstrap"
EXAMPLES = 5


@dataclass(frozen=True)
class Comparison:
    """How far one kind of score is higher in B than in A. `p` is that of `test`; `p_holm` is adjusted for the
    benchmarks that were compared along with this one."""

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
    mcnemar_p: float | None  # None where scores are not 0 or 1, or the headline is not their mean
    bootstrap_p: float
    counts: dict[str, int]  # both_right, only_a, only_b, both_wrong


def compare(a: Result, b: Result) -> list[Comparison]:
    """Of each kind of score that both have.

    Raises UserError that names what differs where the two did not answer the same questions in the same way.
    """
    if found := differences(a, b):
        listed = "\n".join(f"  {difference}" for difference in found)
        raise UserError(f"{a.folder} and {b.folder} cannot be compared question by question:\n{listed}")
    kinds = [kind for kind in KINDS if has(a, kind) and has(b, kind)]
    if not kinds:
        raise UserError(f"{a.folder} and {b.folder} have no scores to compare: the answers to {a.name} are not public")
    return [made for kind in kinds if (made := compare_kind(a, b, kind)) is not None]


def has(result: Result, kind: str) -> bool:
    """Whether every question has a score of the kind."""
    figure = result.report["scores"].get(kind) or {"value": None}
    return figure["value"] is not None and all(row.get(kind) is not None for row in result.rows)


def compare_kind(a: Result, b: Result, kind: str) -> Comparison | None:
    """None where one of the two figures is not a number, as a share of no answers.

    McNemar's test is exact for scores of 0 and 1, and takes questions to be independent. Where several are on one image
    or video, they are not, and the paired bootstrap of whole clusters is the test.
    """
    benchmark, of_b = BENCHMARKS[a.benchmark](), {row["id"]: row for row in b.rows}
    pairs = [(row, of_b[row["id"]]) for row in a.rows]
    clusters = [row["cluster"] for row in a.rows]  # B may name the same files elsewhere
    table_a, table_b = (_table(rows, clusters, kind) for rows in zip(*pairs, strict=True))
    is_mean = kind == "judged" or benchmark.headline_is_mean
    headline = partial(Benchmark.headline, benchmark) if is_mean else benchmark.headline
    statistic = partial(headline, kind=kind)
    found = paired_difference(table_a, table_b, statistic, PERCENT if kind == "judged" else benchmark.bounds)
    if found is None:
        return None
    counts = count([(x[kind], y[kind]) for x, y in pairs])
    exact = None
    if is_mean and all(row[kind] in (0, 1) for pair in pairs for row in pair):
        exact = mcnemar(counts["only_a"], counts["only_b"])
    independent = table_a.clusters == len(pairs)
    test, p = (EXACT, exact) if exact is not None and independent else (BOOTSTRAP, found.p)
    return Comparison(
        name=a.name,
        benchmark=a.benchmark,
        kind=kind,
        n=len(pairs),
        clusters=table_a.clusters,
        a=float(statistic(table_a.whole())[0]),
        b=float(statistic(table_b.whole())[0]),
        difference=found.value,
        low=found.low,
        high=found.high,
        test=test,
        p=p,
        p_holm=p,
        mcnemar_p=exact,
        bootstrap_p=found.p,
        counts=counts,
    )


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With `p_holm` over the comparisons of each kind."""
    made = list(comparisons)
    for kind in KINDS:
        places = [i for i, one in enumerate(made) if one.kind == kind]
        for i, p in zip(places, holm([made[i].p for i in places]), strict=True):
            made[i] = replace(made[i], p_holm=p)
    return made


def differences(a: Result, b: Result, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """Why the two cannot be held against each other, in words; what a receipt does not say is not held against it."""
    if a.benchmark != b.benchmark:
        return [f"benchmark: {a.benchmark} and {b.benchmark}"]
    one, other = a.receipt, b.receipt
    found = []
    for key in ("scorer_version", "judge", "prompt_template"):
        if one.get(key) != other.get(key) and None not in (one.get(key), other.get(key)):
            found.append(f"{key}: {one[key]!r} and {other[key]!r}")
    same_ids = {row["id"] for row in a.rows} == {row["id"] for row in b.rows}
    if same_ids and one.get("question_set") == other.get("question_set") is not None:
        return found
    splits = BENCHMARKS[a.benchmark].splits
    asked = [(r.get("split") or next(iter(splits), None), r.get("limit")) for r in (one, other)]
    for key, x, y in zip(("split", "limit"), *asked, strict=True):
        if x != y:
            found.append(f"{key}: {x or 'none'} and {y or 'none'}")
    return found + _other_questions(a, b, names)


def _other_questions(a: Result, b: Result, names: tuple[str, str]) -> list[str]:
    rows, others = ({row["id"]: row for row in result.rows} for result in (a, b))
    found = []
    for where, ids in zip(names, (rows.keys() - others.keys(), others.keys() - rows.keys()), strict=True):
        if ids:
            found.append(f"questions: {len(ids)} only in {where}, such as {_some(ids)}")
    shared = rows.keys() & others.keys()
    told: dict[str, Callable[[Row], Any]] = {
        "question": lambda row: row["question"],
        "references": lambda row: row["references"],
        "media": lambda row: [path.replace("\\", "/").rpartition("/")[2] for path in row["media"]],
    }
    for key, of in told.items():
        if ids := {i for i in shared if of(rows[i]) != of(others[i])}:
            first = min(ids)
            pair = f"{of(rows[first])!r:.80} and {of(others[first])!r:.80}"
            found.append(f"{key}: other in {len(ids)} questions, such as {first!r}: {pair}")
    return found or ["question_set: what was said before the question is other, or a receipt does not tell"]


def _some(ids: set[str]) -> str:
    return ", ".join(repr(i) for i in sorted(ids)[:3])


def _table(rows: Sequence[Row], clusters: Sequence[str], kind: str) -> Table:
    if kind == "judged":
        return Table({kind: [row[kind] for row in rows], "n": [1.0] * len(rows)}, clusters)
    return score_table(rows, clusters)


def count(pairs: Sequence[tuple[float, float]]) -> dict[str, int]:
    """How many answers both have right, one alone or neither; an answer worth half or more is right."""
    right = [(x >= RIGHT, y >= RIGHT) for x, y in pairs]
    names = {"both_right": (True, True), "only_a": (True, False), "only_b": (False, True), "both_wrong": (False, False)}
    return {name: right.count(which) for name, which in names.items()}


def flipped(a: Result, b: Result, kind: str) -> dict[str, list[dict[str, Any]]]:
    """Some questions that are worth more in A, and some in B: the first of those whose worth differs most."""
    of_b = {row["id"]: row for row in b.rows}
    pairs = [(row, of_b[row["id"]]) for row in a.rows]
    found = {}
    for name, sign in (("better_in_a", 1), ("better_in_b", -1)):
        chosen = [pair for pair in pairs if sign * (pair[0][kind] - pair[1][kind]) > 0]
        chosen.sort(key=lambda pair: -abs(pair[0][kind] - pair[1][kind]))
        found[name] = [
            {
                **{key: x[key] for key in ("id", "question", "media", "references")},
                "a": x[kind],
                "b": y[kind],
                "response_a": x["response"],
                "response_b": y["response"],
            }
            for x, y in chosen[:EXAMPLES]
        ]
    return found


def matched(a: Sequence[Result], b: Sequence[Result]) -> tuple[list[tuple[Result, Result]], list[Result]]:
    """The pairs of the same name and benchmark, and the results without a partner. Two results alone are a pair,
    whatever they are called."""
    if len(a) == len(b) == 1:
        return [(a[0], b[0])], []
    ones, others = ({(r.name, r.benchmark): r for r in results} for results in (a, b))
    pairs = [(ones[key], others[key]) for key in ones if key in others]
    return pairs, [r for key, r in (ones | others).items() if (key in ones) != (key in others)]


def unlike(a: Result, b: Result) -> list[str]:
    """What else differs between two results that can be compared, to be told beside the figures."""
    found = []
    for key in ("num_frames", "video_reader", "decoding", "dtype"):
        x, y = a.receipt.get(key), b.receipt.get(key)
        if x != y and None not in (x, y):
            found.append(f"{key}: {x} and {y}")
    if missing := [name for name, r in (("A", a), ("B", b)) if r.receipt.get("prompt_template") is None]:
        found.append(f"the prompt is not told by {' and '.join(missing)}: answers that were not generated here")
    return found
