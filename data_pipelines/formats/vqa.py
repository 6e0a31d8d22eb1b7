"""Tables of questions and answers: `question`, `answer` or `answers`, and optionally `image` or `video`.

    question,answer,image
    How many cats are there?,2,cats.jpg

A list of answers (strings, or VQAv2's `{"answer": …}`) holds the answers of several annotators. Training uses the most
common one, or `multiple_choice_answer` if the row has it; the benchmark `vqa` scores against all of them. In a table,
`answers` is such a list as text, in JSON or Python syntax.
Source: https://visualqa.org/download.html
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, shown
from data_pipelines.formats.turns import conversation, row_media, text_of
from data_pipelines.rows import RowError
from data_pipelines.samples import Sample

NO_COMMA = re.compile(r"""['"]\s+['"]""")  # numpy writes lists so; Python would join the strings


@DATASET_FORMATS.register("vqa")
class VQARows(Format):
    """Questions and answers in CSV, TSV, JSON or Parquet: `question`, `answer` or `answers`, `image` or `video`."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return "question" in row and not {"answer", "answers", "multiple_choice_answer"}.isdisjoint(row)

    def parse(self, row: Any, place: Place) -> Sample:
        if not isinstance(row, dict):
            raise RowError(f"expected an object with 'question' and 'answer', not {type(row).__name__}")
        answers = self._answers(row)
        named = {"multiple_choice_answer": as_text(row.get("multiple_choice_answer"))}
        chosen = text_of(named, "multiple_choice_answer", Counter(answers).most_common(1)[0][0])
        turns = conversation(
            [("user", text_of(row, "question"), True), ("assistant", chosen, True)], row_media(row, place)
        )
        several = answers if len(answers) > 1 else None
        return place.sample(turns, row.get("category", row.get("question_type")), several)

    def _answers(self, row: dict[str, Any]) -> list[str]:
        key = next((k for k in ("answers", "answer", "multiple_choice_answer") if row.get(k) is not None), "answer")
        value = row.get(key)
        if key == "answers" and isinstance(value, str) and value.lstrip().startswith("["):
            value = parse_list(value)
        listed = value if isinstance(value, list) else [value]
        answers: list[Any] = [as_text(entry.get("answer") if isinstance(entry, dict) else entry) for entry in listed]
        if not answers or not all(isinstance(text, str) and text.strip() for text in answers):
            invalid = next((text for text in answers if not isinstance(text, str) or not text.strip()), None)
            raise RowError(
                f"{key!r} must be a non-empty string, a whole number, or a list of them, not {shown(invalid)}"
            )
        return answers


def as_text(answer: Any) -> Any:
    """Return a whole number as text, 2.0 as "2": a table column with missing values holds its numbers as floats."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return str(answer) if isinstance(answer, int) and not isinstance(answer, bool) else answer


def parse_list(text: str) -> Any:
    """Parse a list in JSON or Python syntax. Raises RowError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        if not NO_COMMA.search(text):
            return ast.literal_eval(text.strip())
        reason = "no comma between two of its strings"
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
    raise RowError(f"'answers' begins with '[' but is not a JSON or Python list ({reason}): {shown(text)}")
