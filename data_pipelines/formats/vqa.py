"""Question and answer rows, as tables have them: `question`, `answer` or `answers`, and `image` or `video`.

    question,answer,image
    How many cats are there?,2,cats.jpg

Several answers (a list of strings, or of VQAv2's `{"answer": …}`) are several annotators' to one question: the
commonest is learnt (`multiple_choice_answer`, where the row has it), and the benchmark `vqa` is scored against all.
Source: https://visualqa.org/download.html
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, shown
from data_pipelines.formats.turns import conversation, row_media, text_of
from data_pipelines.rows import RowError
from data_pipelines.samples import Sample


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
        chosen = text_of(row, "multiple_choice_answer", Counter(answers).most_common(1)[0][0])
        turns = conversation(
            [("user", text_of(row, "question"), True), ("assistant", chosen, True)], row_media(row, place)
        )
        several = answers if len(answers) > 1 else None
        return place.sample(turns, row.get("category", row.get("question_type")), several)

    def _answers(self, row: dict[str, Any]) -> list[str]:
        key = next((k for k in ("answers", "answer", "multiple_choice_answer") if row.get(k) is not None), "answer")
        value = row.get(key)
        listed = value if isinstance(value, list) else [value]
        found: list[Any] = [entry.get("answer") if isinstance(entry, dict) else entry for entry in listed]
        if not found or not all(isinstance(text, str) and text.strip() for text in found):
            wrong = next((text for text in found if not isinstance(text, str) or not text.strip()), None)
            raise RowError(f"{key!r} must be a string, or a list of strings, none empty; found {shown(wrong)}")
        return found
