"""Stages two and three: answers to scores (pure), and scores to `report.json` with intervals and a receipt."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.benchmarks import BENCHMARKS, Question, Score
from eval.metrics import cluster_bootstrap, majority_share
from mmdora.config import EvaluationConfig


def score_all(benchmark: str, responses: Mapping[str, str], questions: list[Question]) -> dict[str, Score]:
    """Every question's score by id. No model, no randomness: scoring again never changes a number."""
    scorer = BENCHMARKS[benchmark]()
    return {q.id: scorer.score(responses[q.id], q) for q in questions}


def make_report(
    config: EvaluationConfig,
    responses: Mapping[str, str],
    questions: list[Question],
    scores: Mapping[str, Score],
    receipt: Mapping[str, Any],
) -> dict[str, Any]:
    """What `report.json` holds. Values are percent, `low` and `high` the 95% interval (clusters of one image or
    video)."""
    clusters = [q.cluster for q in questions]

    def estimate(kind: str, chosen: list[int]) -> dict[str, float]:
        values = [getattr(scores[questions[i].id], kind) for i in chosen]
        result = asdict(cluster_bootstrap(values, [clusters[i] for i in chosen]))
        return {k: round(v, 4) for k, v in result.items()}

    everything = list(range(len(questions)))
    categories: dict[str, list[int]] = defaultdict(list)
    for i, q in enumerate(questions):
        if q.category is not None:
            categories[q.category].append(i)
    single = all(len(q.references) == 1 for q in questions)
    return {
        "name": config.name,
        "benchmark": config.benchmark,
        "n": len(questions),
        "scores": {kind: estimate(kind, everything) for kind in ("official", "strict")},
        "unparsed_rate": sum(scores[q.id].unparsed for q in questions) / len(questions),
        "majority_baseline": round(100 * majority_share([q.references[0] for q in questions]), 4) if single else None,
        "categories": {
            name: {"n": len(chosen), **estimate("official", chosen)} for name, chosen in sorted(categories.items())
        },
        **BENCHMARKS[config.benchmark]().extras(responses, questions),
        "receipt": dict(receipt),
    }


def write_results(
    folder: Path,
    responses: Mapping[str, str],
    questions: list[Question],
    scores: Mapping[str, Score],
    report: Mapping[str, Any],
) -> None:
    """`scores.jsonl`, one line a question, and then `report.json`, whose presence says that the result is complete."""
    lines = [
        {
            "id": q.id,
            "question": q.sample.messages[-1].text,
            "media": [str(part.path) for part in q.sample.media()],
            "references": list(q.references),
            "response": responses[q.id],
            "cluster": q.cluster,
            "category": q.category,
            **asdict(scores[q.id]),
        }
        for q in questions
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "scores.jsonl").write_text(text, encoding="utf-8")
    aside = folder / ".report.json"
    aside.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(folder / "report.json")


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def read_scores(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
