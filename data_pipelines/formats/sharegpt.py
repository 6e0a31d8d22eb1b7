"""ShareGPT's form as LLaMA-Factory writes it: `conversations` as LLaVA's, `images`/`videos` lists, `system` beside.

    {"conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}],
     "system": "Be brief.", "images": ["cat.jpg"]}

Source: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

from typing import Any, ClassVar

from data_pipelines.formats.llava import SHAREGPT, LLaVA, Turns
from data_pipelines.formats.registry import DATASET_FORMATS
from data_pipelines.formats.turns import text_of

TOOLS = "tool calls cannot be trained here; leave such rows out"


@DATASET_FORMATS.register("sharegpt")
class ShareGPT(LLaVA):
    """ShareGPT's form as LLaMA-Factory writes it: `conversations`, with `images`, `videos` and `system` beside."""

    roles: ClassVar = LLaVA.roles | {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
    unusable: ClassVar = dict.fromkeys(("function_call", "observation", "tool", "function"), TOOLS)

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return "conversations" in row and not SHAREGPT.isdisjoint(row)

    def turns(self, row: dict[str, Any]) -> Turns:
        system = text_of(row, "system", "")
        return [("system", system, True), *super().turns(row)] if system else super().turns(row)
