"""The contract of an adapter method, and the registry that the config's `parts.*.method` names."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mmdora.architectures import Region
from mmdora.config import PartConfig
from mmdora.registry import Registry


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


class AdapterMethod(ABC):
    """How one part of a model is tuned."""

    settings: ClassVar[frozenset[str]]  # the keys of PartConfig, beside `method`, that mean something to it

    @abstractmethod
    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> dict[str, LowRankSpec]:
        """The layers of the part that get an adapter, by full path; nothing changes yet.

        Empty for a method that adapts no single layers. Raises UserError that names `parts.<part>` and the key.
        """

    @abstractmethod
    def apply(self, model: nn.Module, region: Region, plan: dict[str, LowRankSpec], name: str) -> list[str]:
        """Make the part trainable this way, in place, as the adapter `name`; returns the modules trained in full."""


ADAPTERS: Registry[type[AdapterMethod]] = Registry("adapter method")
RATES = frozenset({"learning_rate", "weight_decay"})
