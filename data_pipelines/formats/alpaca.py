"""Alpaca: `instruction`, `input` and `output`, optionally `history`, `system` and media.

    {"instruction": "Answer with true or false.", "input": "Is water wet?", "output": "true"}

`history` is a list of earlier [question, answer] pairs. commonsense_170k has this format; its additional `answer` key
is ignored. Source: https://github.com/tatsu-lab/stanford_alpaca#data-release
"""

from __future__ import annotations

from typing import Any

from data_pipelines.formats.llava import Turns
from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place
from data_pipelines.formats.turns import conversation, row_media, text_of
from data_pipelines.rows import RowError
from data_pipelines.samples import Sample


@DATASET_FORMATS.register("alpaca")
class Alpaca(Format):
    """Alpaca: `instruction`, `input` and `output`, optionally `history` and `system`."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return "instruction" in row and "output" in row

    def parse(self, row: Any, place: Place) -> Sample:
        if not isinstance(row, dict):
            raise RowError(f"expected an object with 'instruction' and 'output', not {type(row).__name__}")
        system = text_of(row, "system", "")
        turns: Turns = [("system", system, True)] if system else []
        history = row.get("history") or []
        if not isinstance(history, list):
            raise RowError("'history' must be a list of [question, answer] pairs")
        for pair in history:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise RowError("'history' must be a list of [question, answer] pairs of strings")
            turns += [("user", pair[0], True), ("assistant", pair[1], True)]
        question = "\n".join(t for t in (text_of(row, "instruction"), text_of(row, "input", "")) if t)
        turns += [("user", question, True), ("assistant", text_of(row, "output"), True)]
        return place.sample(conversation(turns, row_media(row, place)), row.get("category"))
