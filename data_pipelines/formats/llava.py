"""LLaVA's JSON: `image` (a string or a list) or `video`, and `conversations` with `human`/`gpt` turns.

    {"id": "1", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                      {"from": "gpt", "value": "A cat."}]}

`<image>` and `<video>` in the text mark the positions of the media. LLaVA-NeXT also uses `<image>` for a video. Media
without a placeholder go before the first question, as in LLaVA's own loader. A row's `system` becomes its first turn.
Source:
https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
"""

from __future__ import annotations

from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, shown
from data_pipelines.formats.turns import conversation, is_trained, row_media, text_of
from data_pipelines.rows import RowError
from data_pipelines.samples import Role, Sample

SHAREGPT = {"images", "videos", "system", "tools"}  # keys of ShareGPT rows; parsed the same way
ROLES: dict[str, Role] = {"human": "user", "user": "user", "system": "system"}
ROLES |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant")
TOOLS = {"function_call", "observation", "tool", "function"}
Turns = list[tuple[Role, str, bool]]


@DATASET_FORMATS.register("llava")
class LLaVA(Format):
    """LLaVA's JSON: `image` or `video`, and `conversations` with `human`/`gpt` turns."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return "conversations" in row and SHAREGPT.isdisjoint(row)

    def parse(self, row: Any, place: Place) -> Sample:
        if not isinstance(row, dict):
            raise RowError(f"expected an object with 'conversations', not {type(row).__name__}")
        files = row_media(row, place)
        return place.sample(conversation(self.turns(row), files), row.get("category"))

    def turns(self, row: dict[str, Any]) -> Turns:
        """Return the turns of a row as (role, text, train). Raises RowError."""
        listed = row.get("conversations")
        if not isinstance(listed, list) or not listed:
            raise RowError("'conversations' must be a list with at least one turn")
        system = text_of(row, "system", "")
        turns: Turns = [("system", system, True)] if system else []
        for number, turn in enumerate(listed):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise RowError(f"turn {number} must be an object with 'from' and a string 'value'")
            speaker = turn.get("from")
            if not isinstance(speaker, str) or speaker not in ROLES:
                why = f"known: {', '.join(ROLES)}"
                if isinstance(speaker, str) and speaker in TOOLS:
                    why = "tool calls are not supported; remove such rows"
                raise RowError(f"turn {number}: 'from' is {shown(speaker)}; {why}")
            turns.append((ROLES[speaker], turn["value"], is_trained(turn, number)))
        return turns
