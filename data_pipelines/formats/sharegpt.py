"""ShareGPT as LLaMA-Factory defines it: `conversations` as in LLaVA, lists `images` and `videos`, and `system`.

    {"conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}],
     "system": "Be brief.", "images": ["cat.jpg"]}

Source: https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

from typing import Any

from data_pipelines.formats.llava import SHAREGPT, LLaVA
from data_pipelines.formats.registry import DATASET_FORMATS


@DATASET_FORMATS.register("sharegpt")
class ShareGPT(LLaVA):
    """ShareGPT as LLaMA-Factory defines it: `conversations`, with `images`, `videos` and `system`."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return "conversations" in row and not SHAREGPT.isdisjoint(row)
