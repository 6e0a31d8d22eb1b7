"""Option extraction for multiple-choice benchmarks whose official code defines none.

A response counts if it names one option unambiguously: by a letter ("B", "(B)", "B. dog", "The answer is B") or by the
option's whole text. Every other response is unparsed and wrong; no option is ever guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.benchmarks.base import Question, Score
from eval.options import LETTERS

LETTER_PROMPT = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."  # LLaVA-1.5's

SINGLE_LETTER = re.compile(r"\W*([A-Za-z])\W*")
# Does not match "A.D."
LEADING_LETTER = re.compile(r"[(\[*]*([A-Z])[)\]*]*(?:[:)\]]|\.(?!\w\.)|\n|\s+is\s+(?:the\s+)?(?:correct|right)\b)")
DECLARED = re.compile(
    r"\b(?i:answer|option|choice)(?i:\s+is|\s*:)?\s*(?i:(?:option|choice)\s+)?[(\[*]*([A-Z])(?![\w'’])"
)
LEAD_IN = re.compile(
    r"^(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:answer|option|choice)\s*(?:is|:)|it\s+is|it's)\s*"
)
ARTICLE = re.compile(r"^(?:a|an|the)\s+")


def chosen_option(response: str, options: Sequence[str]) -> int | None:
    """Return the index of the option that the response names; None if it names none or is ambiguous."""
    single = SINGLE_LETTER.fullmatch(response)
    if single and single[1].upper() in LETTERS[: len(options)]:
        return LETTERS.index(single[1].upper())
    text = _strip_answer(response)
    matches = [i for i, option in enumerate(options) if text and _strip_answer(option) == text]
    if len(matches) == 1:
        return matches[0]
    letter = _letter(response)
    return LETTERS.index(letter) if letter and letter in LETTERS[: len(options)] else None


def _letter(response: str) -> str | None:
    """Return the only letter after "answer", "option" or "choice", or else at the beginning; None if unclear."""
    declared = set(DECLARED.findall(response))
    if not declared and (leading := LEADING_LETTER.match(response.strip())):
        declared = {leading[1]}
    return declared.pop() if len(declared) == 1 else None


def _strip_answer(text: str) -> str:
    """Return the text in lower case, without lead-in ("the answer is"), leading article and surrounding punctuation."""
    stripped = LEAD_IN.sub("", " ".join(text.lower().split()))
    return ARTICLE.sub("", stripped.strip(" .,:;!?\"'*()[]"))


def score_choice(response: str, question: Question) -> Score:
    """Score a response by the options in the question's details; one that names no option is wrong and unparsed."""
    index = chosen_option(response, question.details["options"])
    correct = float(index is not None and LETTERS[index] == question.references[0])
    return Score(correct, correct, unparsed=index is None)
