"""The settings of one low-rank adapter on one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LowRankSpec:
    """The settings of one named adapter on one layer.

    LoRA computes with W' = W + sBA. With `use_dora`, W' = m ⊙ (W + sBA) / ‖W + sBA‖.
    """

    rank: int  # r; 0 trains only the magnitude
    alpha: float
    dropout: float = 0.0  # probability, on the input of the low-rank branch
    use_rslora: bool = False
    use_dora: bool = False
    use_vera: bool = False  # A and B are random, shared and frozen; a factor for each of their rows is trained
    peft_dropout: bool = False  # DoRA: apply dropout also to the x of the base product that the gain scales, as PEFT
    forward: Literal["auto", "exact", "merged"] = "auto"  # linear layers: multiply x by A and B, or by W + sBA

    @property
    def scale(self) -> float:
        """s = alpha / r, with rsLoRA alpha / √r; 1 for rank 0."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank) if self.rank else 1.0
