"""NLVR2 (lil-lab/nlvr, nlvr2/eval/metrics.py)."""

from __future__ import annotations

from data_pipelines.samples import Sample
from eval.benchmarks import BENCHMARKS
from eval.benchmarks.base import Question
from eval.benchmarks.nlvr2 import sentence_of
from eval.scoring import score_all
from tests.official import official


@official("nlvr2", "dataset")
def dataset(case):
    responses = dict(map(tuple, case["predictions_csv_rows"]))
    questions = [
        Question(key, Sample(key, (), "t"), (row["label"].lower(),), sentence_of(key))
        for row in case["labeled_examples"]
        for key in [row["identifier"]]
    ]
    scores = score_all("nlvr2", responses, questions)
    right = [scores[q.id].official for q in questions]
    return {
        "accuracy": sum(right) / len(right),
        "consistency": BENCHMARKS["nlvr2"]().extras(responses, questions)["consistency"] / 100,
    }
