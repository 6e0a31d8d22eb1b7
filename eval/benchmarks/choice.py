"""Which option of a multiple-choice question an answer means, where no official code says how to find one.

An answer counts if it says clearly which option it means: by a letter ("B", "(B)", "B. dog", "The answer is B"), or by
the option's whole text. Whatever else was said is unparsed and wrong; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.benchmarks.base import Question, Score
from eval.options import LETTERS

LETTER_PROMPT = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."  # LLaVA-1.5's

ALONE = re.compile(r"\W*([A-Za-z])\W*")
FIRST = re.compile(r"[(\[*]*([A-Z])[)\]*]*(?:[:)\]]|\.(?!\w\.)|\n|\s+is\s+(?:the\s+)?(?:correct|right)\b)")  # no "A.D."
SAID = re.compile(r"\b(?i:answer|option|choice)(?i:\s+is|\s*:)?\s*(?i:(?:option|choice)\s+)?[(\[*]*([A-Z])(?![\w'’])")
LEAD_IN = re.compile(
    r"^(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:answer|option|choice)\s*(?:is|:)|it\s+is|it's)\s*"
)
ARTICLE = re.compile(r"^(?:a|an|the)\s+")


def chosen_option(said: str, options: Sequence[str]) -> int | None:
    """The index of the option that is meant; None where it is not clear, or is none of them."""
    alone = ALONE.fullmatch(said)
    if alone and alone[1].upper() in LETTERS[: len(options)]:
        return LETTERS.index(alone[1].upper())
    words = _bare(said)
    same = [i for i, option in enumerate(options) if words and _bare(option) == words]
    if len(same) == 1:
        return same[0]
    letter = _letter(said)
    return LETTERS.index(letter) if letter and letter in LETTERS[: len(options)] else None


def _letter(said: str) -> str | None:
    """The letter that is said, if just one is: after "answer", "option" or "choice", or else at the beginning."""
    declared = set(SAID.findall(said))
    if not declared and (first := FIRST.match(said.strip())):
        declared = {first[1]}
    return declared.pop() if len(declared) == 1 else None


def _bare(text: str) -> str:
    """Lower case, without what leads in to an answer, articles, and marks around it."""
    words = LEAD_IN.sub("", " ".join(text.lower().split()))
    return ARTICLE.sub("", words.strip(" .,:;!?\"'*()[]"))


def score_choice(response: str, question: Question) -> Score:
    """Right or wrong, by the options in the question's details; no option named is wrong, and unparsed."""
    index = chosen_option(response, question.details["options"])
    right = float(index is not None and LETTERS[index] == question.references[0])
    return Score(right, right, unparsed=index is None)
