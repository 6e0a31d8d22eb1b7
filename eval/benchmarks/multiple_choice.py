"""`multiple_choice`: one of several options, over any dataset format: what one's own held-out data are scored with.

The question's text holds the options, one a line, as "A. cat" or "(A) cat"; the dataset's answer is a letter or an
option's text. There is no official scorer: how an option is found in an answer is told in choice.py.
"""

from __future__ import annotations

import re
from dataclasses import replace

from eval.benchmarks.base import BENCHMARKS, Question, Score
from eval.benchmarks.choice import chosen_option, score_choice
from eval.benchmarks.own_data import OwnData
from eval.options import LETTERS
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)


def read_options(text: str) -> list[str]:
    """The options' texts: the lines of a question that begin with A, B, C … in this order; none where there are not at
    least two."""
    options: list[str] = []
    for letter, option in OPTION_LINE.findall(text):
        if letter == "A":  # a list that begins anew is the question's own
            options = []
        if letter == LETTERS[len(options) : len(options) + 1]:
            options.append(option)
    return options if len(options) > 1 else []


@BENCHMARKS.register("multiple_choice")
class MultipleChoice(OwnData):
    """One of several options over any dataset format, by what was clearly said (no official scorer: own data)."""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        return [with_options(question, config.data) for question in super().questions(config)]

    def score(self, response: str, question: Question) -> Score:
        return score_choice(response, question)


def with_options(question: Question, source: str) -> Question:
    """The question with its options as details, and the right one's letter as its only reference.

    Raises UserError where the text holds no options, or the answer is none of them.
    """
    options = read_options(question.sample.messages[-1].text)
    if not options:
        raise UserError(f'{source}: sample {question.id!r} has no options: lines such as "A. cat" and "B. dog"')
    meant = {chosen_option(reference, options) for reference in question.references}
    index = meant.pop() if len(meant) == 1 else None
    if index is None:
        what = f"its answer is {' and '.join(map(repr, question.references))}"
        raise UserError(
            f"{source}: sample {question.id!r} has the options {', '.join(LETTERS[: len(options)])}, and {what}"
        )
    return replace(question, references=(LETTERS[index],), details={**question.details, "options": options})
