"""The contract of an adapter method, and the registry that the config's `parts.*.method` names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from mmdora.adapters.spec import LowRankSpec
from mmdora.core.config import PartConfig
from mmdora.core.registry import Registry
from mmdora.models.architectures import Region


@dataclass(frozen=True)
class PartPlan:
    """What becomes of one part, by full paths."""

    layers: dict[str, LowRankSpec] = field(default_factory=dict)  # that get an adapter
    whole: list[str] = field(default_factory=list)  # modules that are trained in full


class AdapterMethod(ABC):
    """How one part of a model is tuned."""

    settings: ClassVar[frozenset[str]]  # the keys of PartConfig, beside `method`, that mean something to it

    @abstractmethod
    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        """What becomes of the part; nothing changes yet. Raises UserError that names `parts.<part>` and the
        key."""

    def apply(self, model: nn.Module, region: Region, layers: dict[str, LowRankSpec], name: str) -> None:
        """Put the adapter `name` on the planned layers of the part, in place."""
        assert not layers  # a method that plans adapters puts them on


ADAPTERS: Registry[type[AdapterMethod]] = Registry("adapter method")
RATES = frozenset({"learning_rate", "layer_decay", "weight_decay"})
