"""VQA v2.0 (GT-Vision-Lab/VQA)."""

from __future__ import annotations

from eval.benchmarks.vqa import (
    normalize,
    process_digits_and_articles,
    process_punctuation,
    strip_whitespace,
    vqa_accuracy,
)
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


@official("vqa_v2", "dataset", left_out=("perQuestionType", "perAnswerType", "evalQA"))
def dataset(questions):
    values = [vqa_accuracy(q["prediction"], tuple(q["answers"])) for q in questions]
    return {"overall": round(100 * sum(values) / len(values), 2)}
