"""Stages two and three of an evaluation: score answers, then write `report.json` with intervals and a receipt.

Scoring is pure: it needs no model and uses no randomness.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from eval.benchmarks import BENCHMARKS, Benchmark, Question, Score
from eval.digests import json_digest
from eval.files import json_text, write_whole
from eval.metrics import Table, cluster_bootstrap, estimate, majority_share
from mmdora.core.config import EvaluationConfig

Figure = dict[str, float | None] | None  # {"value", "low", "high"}; None if there is no such figure


def score_all(benchmark: str, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Score]:
    """Return every question's score by id; empty if the split's answers are not public, or only a judge scores them."""
    scorer = BENCHMARKS[benchmark]()
    if not scorer.has_official or not all(q.references for q in questions):
        return {}
    return scorer.score_all(responses, questions)


def make_report(
    config: EvaluationConfig,
    responses: Mapping[str, str],
    questions: Sequence[Question],
    scores: Mapping[str, Score],
    receipt: Mapping[str, Any],
    judged: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the contents of `report.json`.

    Values are in the benchmark's unit (accuracy in percent). `low` and `high` are the 95% interval, from a bootstrap
    over clusters (images or videos). `judged` holds a judge's scores, 0 to 1, by question id; they are reported
    separately, in percent.
    """
    benchmark = BENCHMARKS[config.benchmark]()
    report: dict[str, Any] = {
        "name": config.name,
        "benchmark": config.benchmark,
        "n": len(questions),
        "scores": {"official": None, "strict": None},
        "unparsed_rate": None,
        "majority_baseline": None,
        "categories": {},
        "metrics": {},
        "receipt": {**receipt, "scorer_version": benchmark.version, "question_set": question_set(questions)},
    }
    if benchmark.is_judged:
        report["scores"]["judged"] = judged_figure(questions, judged)
    report["categories"] = breakdown(benchmark, questions, scores, judged)
    if not scores:
        return report
    strict, unparsed, majority = None, None, None
    if benchmark.has_strict:
        strict = figure(benchmark, questions, scores, "strict")
        unparsed = sum(scores[q.id].unparsed for q in questions) / len(questions)
        # A headline that is not a mean has another unit than the baseline's share.
        if benchmark.headline_is_mean and all(len(q.references) == 1 for q in questions):
            majority = 100 * majority_share([q.references[0] for q in questions])
    report["scores"] |= {"official": figure(benchmark, questions, scores, "official"), "strict": strict}
    return report | {
        "unparsed_rate": unparsed,
        "majority_baseline": majority,
        "metrics": _finite(benchmark.extras(responses, questions)),
    }


def breakdown(
    benchmark: Benchmark,
    questions: Sequence[Question],
    scores: Mapping[str, Score],
    judged: Mapping[str, float] | None,
) -> dict[str, dict[str, Any]]:
    """Return each category's official figure, with the judged one beside it; empty if there are no scores."""
    members: dict[str, list[Question]] = defaultdict(list)
    for q in questions if scores or judged else ():
        for category in q.categories:
            members[category].append(q)
    return {
        name: {
            "n": len(chosen),
            **((figure(benchmark, chosen, scores, "official") if scores else None) or {"value": None}),
            **({"judged": judged_figure(chosen, judged)} if judged else {}),
        }
        for name, chosen in sorted(members.items())
    }


def judged_figure(questions: Sequence[Question], judged: Mapping[str, float] | None) -> Figure:
    """Return the mean in percent with its interval, or None without a judge."""
    if not judged:
        return None
    return asdict(cluster_bootstrap([judged[q.id] for q in questions], [q.cluster for q in questions]))


def figure(benchmark: Benchmark, questions: Sequence[Question], scores: Mapping[str, Score], kind: str) -> Figure:
    """Return the benchmark's headline over some questions, with its interval."""
    clusters = [q.cluster for q in questions]
    chosen = [scores[q.id] for q in questions]
    if benchmark.headline_is_mean:
        return asdict(cluster_bootstrap([getattr(s, kind) for s in chosen], clusters, benchmark.bounds))
    table = score_table([asdict(s) for s in chosen], clusters)
    headline = estimate(table, partial(benchmark.headline, kind=kind), benchmark.bounds)
    return asdict(headline) if headline is not None else None


def score_table(scores: Sequence[Mapping[str, Any]], clusters: Sequence[str]) -> Table:
    """Return the columns that `Benchmark.headline` sums, from rows of `scores.jsonl`."""
    names = sorted({name for score in scores for name in score["counts"]})
    columns = {name: [score["counts"].get(name, 0.0) for score in scores] for name in names}
    fixed = {kind: [float(score[kind]) for score in scores] for kind in ("official", "strict")}
    return Table(columns | fixed | {"n": [1.0] * len(scores)}, clusters)


def question_set(questions: Iterable[Question]) -> str:
    """Return a digest of the questions, independent of the model: ids, texts, names of media files, references."""
    rows = [
        (q.id, [m.text for m in q.sample.messages], [part.path.name for part in q.sample.media()], q.references)
        for q in questions
    ]
    return json_digest(sorted(rows))


def score_and_write(
    folder: Path,
    config: EvaluationConfig,
    responses: Mapping[str, str],
    questions: Sequence[Question],
    receipt: Mapping[str, Any],
    judged: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Score the answers, write the result into `folder` and return the report."""
    scores = score_all(config.benchmark, responses, questions)
    report = make_report(config, responses, questions, scores, receipt, judged)
    write_results(folder, responses, questions, scores, report, judged)
    return report


def write_results(
    folder: Path,
    responses: Mapping[str, str],
    questions: Sequence[Question],
    scores: Mapping[str, Score],
    report: Mapping[str, Any],
    judged: Mapping[str, float] | None = None,
) -> None:
    """Write `scores.jsonl`, one line per question, then `report.json`, whose presence marks the result as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    unscored: dict[str, Any] = {"official": None, "strict": None, "unparsed": None, "counts": {}}
    lines = [
        {
            "id": q.id,
            "question": next(m.text for m in reversed(q.sample.messages) if m.role == "user"),
            "media": [str(part.path) for part in q.sample.media()],
            "references": list(q.references),
            "response": responses[q.id],
            "cluster": q.cluster,
            "categories": list(q.categories),
            "details": dict(q.details),
            **(asdict(scores[q.id]) if scores else unscored),
            **({"judged": judged[q.id]} if judged else {}),
        }
        for q in questions
    ]
    write_whole(folder / "scores.jsonl", "".join(map(json_text, lines)))
    write_whole(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    """Return the value with null in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
