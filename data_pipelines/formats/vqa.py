"""Question and answer rows, as tables have them: `question`, `answer` or `answers`, and `image` or `video`.

    question,answer,image
    How many cats are there?,2,cats.jpg

Several answers (a list of strings, or of VQAv2's `{"answer": …}`) are several annotators' to one question: the
commonest is learnt (`multiple_choice_answer`, where the row has it), and the benchmark `vqa` is scored against all. A
table's `answers` hold the list as text: JSON, or as Python writes it.
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

NO_COMMA = re.compile(r"""['"]\s+['"]""")  # as numpy writes lists; Python would read one long string


@DATASET_FORMATS.register("vqa")
class VQARows(Format):
    """Question and answer rows of CSV, TSV, JSON or Parquet: `question`, `answer` or `answers`, `image` or `video`."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return "question" in row and not {"answer", "answers", "multiple_choice_answer"}.isdisjoint(row)

    def parse(self, row: Any, place: Place) -> Sample:
        if not isinstance(row, dict):
            raise RowError(f"expected an object with 'question' and 'answer', found {type(row).__name__}")
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
            value = written_list(value)
        listed = value if isinstance(value, list) else [value]
        found: list[Any] = [as_text(entry.get("answer") if isinstance(entry, dict) else entry) for entry in listed]
        if not found or not all(isinstance(text, str) and text.strip() for text in found):
            wrong = next((text for text in found if not isinstance(text, str) or not text.strip()), None)
            raise RowError(
                f"{key!r} must be a string or a whole number, or a list of them, none empty; found {shown(wrong)}"
            )
        return found


def as_text(answer: Any) -> Any:
    """A whole number as text, and 2.0 as "2": a table's numbers have a point where one of their column is missing."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return str(answer) if isinstance(answer, int) and not isinstance(answer, bool) else answer


def written_list(text: str) -> Any:
    """The list that a table's field holds as text. Raises RowError."""
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
    raise RowError(f"'answers' begins with '[' and is no list of JSON or Python ({reason}): {shown(text)}")
