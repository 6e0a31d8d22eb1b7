"""VQA v2.0 (GT-Vision-Lab/VQA)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from eval.benchmarks import BENCHMARKS
from eval.benchmarks.vqa import (
    normalize,
    process_digits_and_articles,
    process_punctuation,
    strip_whitespace,
    vqa_accuracy,
)
from eval.scoring import make_report, score_all
from mmdora.core.config import EvaluationConfig
from tests.official import official


@official("vqa_v2", "normalize")
def normalized(text):
    stripped = strip_whitespace(text)
    return {
        "after_strip": stripped,
        "processPunctuation": process_punctuation(stripped),
        "processDigitArticle_only": process_digits_and_articles(stripped),
        "full": normalize(text),
    }


@official("vqa_v2", "question")
def question(case):
    return {"accuracy_percent": round(100 * vqa_accuracy(case["prediction"], tuple(case["answers"])), 2)}


@official("vqa_v2", "dataset")
def dataset(rows):
    """Score like the official script: annotations and results in files, two decimals."""
    benchmark = BENCHMARKS["vqav2"]()
    annotations = [
        {
            "question_id": row["question_id"],
            "image_id": number,
            "question_type": row["question_type"],
            "answer_type": row["answer_type"],
            "answers": [{"answer_id": i, "answer": answer} for i, answer in enumerate(row["answers"], 1)],
        }
        for number, row in enumerate(rows)
    ]
    with tempfile.TemporaryDirectory() as name:
        path, results = Path(name) / "v2_mscoco_val2014_annotations.json", Path(name) / "results.json"
        path.write_text(json.dumps({"annotations": annotations}))
        results.write_text(json.dumps([{"question_id": r["question_id"], "answer": r["prediction"]} for r in rows]))
        config = EvaluationConfig(name="vqav2", benchmark="vqav2", data=str(path))
        questions = benchmark.questions(config)
        responses = dict(benchmark.read_predictions(results, questions))
    scores = score_all("vqav2", responses, questions)
    report = make_report(config, responses, questions, scores, {})

    def by(kind):
        chosen = {k: v["value"] for k, v in report["categories"].items() if k.startswith(f"{kind}: ")}
        return {key.removeprefix(f"{kind}: "): round(value, 2) for key, value in chosen.items()}

    return {
        "overall": round(report["scores"]["official"]["value"], 2),
        "perQuestionType": by("question type"),
        "perAnswerType": by("answer type"),
        "evalQA": {q.id: round(100 * scores[q.id].official, 2) for q in questions},
    }
