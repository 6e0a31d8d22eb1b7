"""The contract of an adapter method, and the registry that the config's `parts.*.method` names."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from mmdora.core.config import PartConfig
from mmdora.core.registry import Registry
from mmdora.models.architectures import Region


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


@dataclass(frozen=True)
class Plan:
    """What becomes of one part, by full paths."""

    layers: dict[str, LowRankSpec] = field(default_factory=dict)  # that get an adapter
    whole: list[str] = field(default_factory=list)  # modules that are trained in full


class AdapterMethod(ABC):
    """How one part of a model is tuned."""

    settings: ClassVar[frozenset[str]]  # the keys of PartConfig, beside `method`, that mean something to it

    @abstractmethod
    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> Plan:
        """What becomes of the part; nothing changes yet. Raises UserError that names `parts.<part>` and the
        key."""

    def apply(self, model: nn.Module, region: Region, layers: dict[str, LowRankSpec], name: str) -> None:
        """Put the adapter `name` on the planned layers of the part, in place."""
        assert not layers  # a method that plans adapters puts them on


ADAPTERS: Registry[type[AdapterMethod]] = Registry("adapter method")
RATES = frozenset({"learning_rate", "layer_decay", "weight_decay"})
