"""The interface of an adapter method, and the registry of methods that `parts.*.method` names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from mmdora.adapters.spec import LowRankSpec
from mmdora.core.config import PartConfig
from mmdora.core.errors import UserError
from mmdora.core.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from mmdora.models.architectures import Region


@dataclass(frozen=True)
class PartPlan:
    """The changes that a method makes to one part. All paths are full module paths."""

    layers: dict[str, LowRankSpec] = field(default_factory=dict)  # layers that get an adapter
    whole: list[str] = field(default_factory=list)  # modules that are trained in full


class AdapterMethod(ABC):
    """How one part of a model is fine-tuned."""

    settings: ClassVar[frozenset[str]]  # the keys of PartConfig, besides `method`, that the method uses

    @abstractmethod
    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        """Return the plan for a part without changing the model.

        Raises UserError that names `parts.<part>` and the key.
        """

    def apply(self, model: nn.Module, region: Region, layers: dict[str, LowRankSpec], name: str) -> None:
        """Add the adapter `name` to the planned layers of the part, in place."""
        assert not layers  # a method that plans adapters overrides this


ADAPTERS: Registry[type[AdapterMethod]] = Registry("adapter method")
RATES = frozenset({"learning_rate", "layer_decay", "weight_decay"})


def part_problems(part: str, config: PartConfig) -> list[str]:
    """Return what is wrong with an entry of `parts`: an unknown method, or settings that its method does not have."""
    try:
        settings = ADAPTERS[config.method].settings
    except UserError as error:
        return [f"parts.{part}.method: {error}"]
    unsupported = [
        key
        for key, field_info in PartConfig.model_fields.items()
        if key not in {"method", *settings}
        and getattr(config, key) != field_info.get_default(call_default_factory=True)
    ]
    reason = f"the method {config.method!r} has no such setting; leave it out"
    return [f"parts.{part}.{key}: {reason}" for key in unsupported]
