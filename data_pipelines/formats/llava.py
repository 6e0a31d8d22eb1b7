"""LLaVA's JSON: `image` (a string or a list) or `video`, and `conversations` with `human`/`gpt` turns.

    {"id": "1", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                      {"from": "gpt", "value": "A cat."}]}

`<image>` and `<video>` in the text say where the media stand; LLaVA-NeXT also writes `<image>` for a video, and media
that no placeholder names stand before the first question, as LLaVA's own loader puts them. Source:
https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
"""

from __future__ import annotations

from typing import Any, ClassVar

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, shown
from data_pipelines.formats.turns import conversation, row_media
from data_pipelines.rows import RowError
from data_pipelines.samples import Role, Sample

SHAREGPT = {"images", "videos", "system", "tools"}  # keys that stand beside the conversation there, and not here
Turns = list[tuple[Role, str, bool]]


@DATASET_FORMATS.register("llava")
class LLaVA(Format):
    """LLaVA's JSON: `image` or `video`, and `conversations` with `human`/`gpt` turns."""

    roles: ClassVar[dict[str, Role]] = {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    }
    unusable: ClassVar[dict[str, str]] = {}  # roles that are known, and why they are refused

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return "conversations" in row and SHAREGPT.isdisjoint(row)

    def parse(self, row: Any, place: Place) -> Sample:
        if not isinstance(row, dict):
            raise RowError(f"expected an object with 'conversations', found {type(row).__name__}")
        files = row_media(row, place)
        return place.sample(conversation(self.turns(row), files), row.get("category"))

    def turns(self, row: dict[str, Any]) -> Turns:
        listed = row.get("conversations")
        if not isinstance(listed, list) or not listed:
            raise RowError("'conversations' must be a list with at least one turn")
        found: Turns = []
        for number, turn in enumerate(listed):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise RowError(f"turn {number} must be an object with 'from' and a string 'value'")
            said_by, train = turn.get("from"), turn.get("train", True)
            if not isinstance(said_by, str) or said_by not in self.roles:
                why = self.unusable.get(said_by) if isinstance(said_by, str) else None
                raise RowError(f"turn {number}: 'from' is {shown(said_by)}; {why or 'known: ' + ', '.join(self.roles)}")
            if not isinstance(train, bool):
                raise RowError(f"turn {number}: 'train' must be true or false, found {shown(train)}")
            found.append((self.roles[said_by], turn["value"], train))
        return found
