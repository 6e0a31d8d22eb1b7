"""`multiple_choice`: one of several options, over any dataset format: what one's own held-out data are scored with.

The question's text holds the options, one a line, as "A. cat" or "(A) cat"; the dataset's answer is a letter or an
option's text. There is no official scorer. An answer counts if it says clearly which option it means: by a letter
("B", "(B)", "B. dog", "The answer is B"), or by the option's whole text. Whatever else was said is unparsed and wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score
from eval.benchmarks.own_data import conversation_questions
from eval.options import LETTERS
from mmdora.config import EvaluationConfig
from mmdora.errors import UserError

LETTER_PROMPT = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."  # LLaVA-1.5's

OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
ALONE = re.compile(r"\W*([A-Za-z])\W*")
FIRST = re.compile(r"[(\[*]*([A-Z])[)\]*]*(?:[.:)\]]|\n|\s+is\s+(?:the\s+)?(?:correct|right)\b)")
SAID = re.compile(r"\b(?i:answer|option|choice)(?i:\s+is|\s*:)?\s*(?i:(?:option|choice)\s+)?[(\[*]*([A-Z])(?![\w'’])")
LEAD_IN = re.compile(
    r"^(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:answer|option|choice)\s*(?:is|:)|it\s+is|it's)\s*"
)
ARTICLE = re.compile(r"^(?:a|an|the)\s+")


def read_options(text: str) -> dict[str, str]:
    """Option texts by letter: the lines of a question that begin with A, B, C … in this order; none where there are
    not at least two."""
    options: dict[str, str] = {}
    for letter, option in OPTION_LINE.findall(text):
        if letter == "A":  # a list that begins anew is the question's own
            options = {}
        if letter == LETTERS[len(options) : len(options) + 1]:
            options[letter] = option
    return options if len(options) > 1 else {}


def chosen(said: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that `said` means; None where it is not clear, or is none of `options`."""
    letter = _letter(said)
    if letter is not None:
        return letter if letter in options else None
    same = [letter for letter, option in options.items() if _bare(option) == _bare(said)]
    return same[0] if len(same) == 1 else None


def _letter(said: str) -> str | None:
    """The letter that is said, if just one is: alone, at the beginning, or after "answer", "option" or "choice"."""
    if alone := ALONE.fullmatch(said):
        return alone[1].upper()
    declared = set(SAID.findall(said))
    if not declared and (first := FIRST.match(said.strip())):
        declared = {first[1]}
    return declared.pop() if len(declared) == 1 else None


def _bare(text: str) -> str:
    """Lower case, without what leads in to an answer, articles, and marks around it."""
    words = LEAD_IN.sub("", " ".join(text.lower().split()))
    return ARTICLE.sub("", words.strip(" .,:;!?\"'*()[]"))


@BENCHMARKS.register("multiple_choice")
class MultipleChoice(Benchmark):
    """One of several options over any dataset format, by what was clearly said (no official scorer: own data)."""

    verified = True

    def questions(self, config: EvaluationConfig) -> list[Question]:
        return [with_options(question, config.data) for question in conversation_questions(config)]

    def score(self, response: str, question: Question) -> Score:
        letter = chosen(response, question.details["options"])
        right = float(letter == question.references[0])
        return Score(right, right, unparsed=letter is None)


def with_options(question: Question, source: str) -> Question:
    """The question with its options as details, and the right one's letter as its only reference.

    Raises UserError where the text holds no options, or the answer is none of them.
    """
    options = read_options(question.sample.messages[-1].text)
    if not options:
        raise UserError(f'{source}: sample {question.id!r} has no options: lines such as "A. cat" and "B. dog"')
    letters = {chosen(reference, options) for reference in question.references}
    if len(letters) != 1 or None in letters:
        what = f"its answer is {' and '.join(map(repr, question.references))}"
        raise UserError(f"{source}: sample {question.id!r} has the options {', '.join(options)}, and {what}")
    return replace(question, references=(letters.pop() or "",), details={**question.details, "options": options})
