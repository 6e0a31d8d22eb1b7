"""The contract of an adapter method, and the registry that the config's `parts.*.method` names."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from mmdora.config import PartConfig
from mmdora.registry import Registry


class AdapterMethod(ABC):
    """How one part of a model is tuned."""

    takes_targets = False  # whether `targets` mean anything to it

    @abstractmethod
    def adapt(self, model: nn.Module, part: str, targets: list[str], config: PartConfig, name: str) -> list[str]:
        """Make the part at path `part` trainable this way, in place; returns the paths of the modules it changed.

        `targets` are the full paths of the layers that `config.targets` chose; `name` is the adapter's name.
        """


ADAPTERS: Registry[type[AdapterMethod]] = Registry("adapter method")


@dataclass(frozen=True)
class LowRankSpec:
    """One named adapter on one layer."""

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class AdapterLayer(ABC, nn.Module):
    """A layer with low-rank adapters beside its frozen weight, as `lora_A.<name>`, `lora_B.<name>` and so on.

    The layer keeps its class's own parameter names (`weight`, `bias`), so a base model's state dict fits before and
    after. `active` is the adapter that the forward pass uses; None is the base layer alone.
    """

    specs: dict[str, LowRankSpec]
    active: str | None

    @abstractmethod
    def add_adapter(self, name: str, spec: LowRankSpec, seed: int = 0) -> None:
        """New parameters that leave the layer's function as it is (B = 0, m = ‖W‖), the same for the same seed."""

    @abstractmethod
    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in PEFT's files: `lora_A.weight`, …"""

    @abstractmethod
    def merge(self, name: str) -> nn.Module:
        """A plain layer with the adapter folded into its weight."""

    @abstractmethod
    def unwrap(self) -> nn.Module:
        """The plain base layer again."""

    @abstractmethod
    def magnitude_for(self, name: str) -> Tensor:
        """‖W + sBA‖ now: the magnitude with which DoRA computes what this LoRA computes."""


def adapter_layers(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapter layer with its path; only those that have an adapter called `name`, where one is given."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer) and (name is None or name in module.specs):
            yield path, module
