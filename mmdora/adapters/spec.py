"""The settings of one low-rank adapter on one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LowRankSpec:
    """One named adapter on one layer: W' = W + sBA, with a magnitude of its own for every row where `use_dora`."""

    rank: int  # 0: the magnitude alone is learnt
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    use_vera: bool = False  # A and B are random, shared and frozen; a factor for each of their rows is learnt
    peft_dropout: bool = False  # DoRA: the dropped input also reaches the base product that the gain scales
    forward: Literal["auto", "exact", "merged"] = "auto"  # linear layers: x meets A and B, or W + sBA

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank) if self.rank else 1.0
