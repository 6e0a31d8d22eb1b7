"""VizWiz-VQA (the VizWiz API)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from eval.benchmarks import BENCHMARKS
from eval.benchmarks.vizwiz import normalize, vizwiz_accuracy
from eval.scoring import make_report, score_all
from mmdora.core.config import EvaluationConfig
from tests.official import official


@official("vizwiz", "normalize_prediction")
def normalized(text):
    return normalize(text)


@official("vizwiz", "question")
def question(case):
    return {"accuracy_percent": round(100 * vizwiz_accuracy(case["prediction"], case["answers"]), 2)}


@official("vizwiz", "dataset")
def dataset(rows):
    benchmark = BENCHMARKS["vizwiz"]()
    annotations = [
        {
            "image": str(number),
            "question": "",
            "answerable": row["answerable"],
            "answers": [{"answer": answer} for answer in row["answers"]],
        }
        for number, row in enumerate(rows)
    ]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "val.json").write_text(json.dumps(annotations))
        config = EvaluationConfig(name="vizwiz", benchmark="vizwiz", data=name)
        questions = benchmark.questions(config)
    responses = {str(number): row["prediction"] for number, row in enumerate(rows)}
    scores = score_all("vizwiz", responses, questions)
    report = make_report(config, responses, questions, scores, {})
    return {
        "overall": round(report["scores"]["official"]["value"], 2),
        "evalQA": {q.id: round(100 * scores[q.id].official, 2) for q in questions},
        **report["metrics"],
    }
