"""Multiple choice: questions with options from your own data in any dataset format.

Data: the question's text lists the options, one per line, as "A. cat" or "(A) cat"; the dataset's answer is a letter or
an option's text.

Scorer (no official one exists): choice.py finds the option that a response names.
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
    """Return the option texts: the lines that begin with A, B, C, … in order. Empty if there are fewer than two."""
    options: list[str] = []
    for letter, option in OPTION_LINE.findall(text):
        if letter == "A":  # a later list that starts at A replaces an earlier one
            options = []
        if letter == LETTERS[len(options) : len(options) + 1]:
            options.append(option)
    return options if len(options) > 1 else []


@BENCHMARKS.register("multiple_choice")
class MultipleChoice(OwnData):
    """Multiple choice: accuracy on questions with options from your own data (no official scorer)."""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        return [with_options(question, config.data) for question in super().questions(config)]

    def score(self, response: str, question: Question) -> Score:
        return score_choice(response, question)


def with_options(question: Question, source: str) -> Question:
    """Return the question with its options in `details` and the correct letter as its only reference.

    Raises:
        UserError: the text has no options, or the answer is none of them.
    """
    options = read_options(question.sample.messages[-1].text)
    if not options:
        raise UserError(f'{source}: sample {question.id!r} has no options; write them as lines, "A. cat" and "B. dog"')
    indices = {chosen_option(reference, options) for reference in question.references}
    index = indices.pop() if len(indices) == 1 else None
    if index is None:
        answers = " and ".join(map(repr, question.references))
        raise UserError(
            f"{source}: sample {question.id!r} has the answer {answers}, which is none of its options "
            f"{', '.join(LETTERS[: len(options)])}"
        )
    return replace(question, references=(LETTERS[index],), details={**question.details, "options": options})
