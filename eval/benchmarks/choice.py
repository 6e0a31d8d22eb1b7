"""Which option of a multiple-choice question an answer names, where the benchmark's official code takes an index and
leaves it to everyone to find one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.benchmarks.base import Question, Score
from eval.options import LETTERS

LETTER = re.compile(r"\(?([A-Z])(?:\)|[.:,](?=\s|$)|$)")  # "B", "(B)", "B. dog"; and not "A dog"
NAMED = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?([A-Z])(?![\w'])")  # "The answer is (B)."


def chosen_option(response: str, options: Sequence[str]) -> int | None:
    """The index of the option whose letter or words the answer gives; None where it gives none, or one that is not
    there. Nothing is guessed."""
    said = response.strip().strip("*\"'[]{}")
    words = _plain(said)
    if words and (same := [i for i, option in enumerate(options) if _plain(option) == words]):
        return same[0]
    found = LETTER.match(said.upper() if len(said) == 1 else said) or NAMED.search(said)
    if found is None:
        return None
    index = LETTERS.index(found[1])
    return index if index < len(options) else None


def score_choice(response: str, question: Question) -> Score:
    """Right or wrong, by the options in the question's details; no option named is wrong, and unparsed."""
    index = chosen_option(response, question.details["options"])
    right = float(index is not None and LETTERS[index] == question.references[0])
    return Score(right, right, unparsed=index is None)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
