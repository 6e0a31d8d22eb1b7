"""Exact match: short answers from your own data in any dataset format.

Scorer (no official one exists): a response is correct if it equals one of the references after both are lower-cased,
runs of whitespace are collapsed, and trailing whitespace and one final period are removed. Nothing else is normalised:
"2" is not "two" and "a dog" is not "dog" (the benchmark `vqa` equates both). `strict` differs from `official` only if
an empty response equals an empty reference.
"""

from __future__ import annotations

from eval.benchmarks.base import BENCHMARKS, Question, Score
from eval.benchmarks.own_data import OwnData


def normalize(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


@BENCHMARKS.register("exact_match")
class ExactMatch(OwnData):
    """Exact match: short answers from your own data, ignoring case, whitespace and a final period."""

    def score(self, response: str, question: Question) -> Score:
        correct = float(normalize(response) in {normalize(reference) for reference in question.references})
        return Score.free_text(correct, response)
