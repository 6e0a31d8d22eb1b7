"""`exact_match`: short answers over any dataset format, right or wrong.

An answer is right if it equals one of the references once both are in lower case, runs of white space are one space,
and white space and one full stop at the end are gone. Nothing else is normalised: "2" is not "two", "a dog" is not
"dog" (the benchmark `vqa` has it so). There is no official scorer; `strict` differs where an empty answer equals an
empty reference.
"""

from __future__ import annotations

from eval.benchmarks.base import BENCHMARKS, Question, Score
from eval.benchmarks.own_data import OwnData


def normalize(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


@BENCHMARKS.register("exact_match")
class ExactMatch(OwnData):
    """Short answers over any dataset format: right if equal to a reference, but for case, spaces and a full stop."""

    def score(self, response: str, question: Question) -> Score:
        right = float(normalize(response) in {normalize(reference) for reference in question.references})
        return Score.of_words(right, response)
