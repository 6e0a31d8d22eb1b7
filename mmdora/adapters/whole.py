"""`full`: every weight of the part is trained. `frozen`: none is."""

from __future__ import annotations

from torch import nn

from mmdora.adapters.base import ADAPTERS, RATES, AdapterMethod, LowRankSpec
from mmdora.config import PartConfig
from mmdora.errors import UserError


@ADAPTERS.register("full")
class Full(AdapterMethod):
    settings = RATES

    def plan(self, model: nn.Module, part: str, path: str, config: PartConfig) -> dict[str, LowRankSpec]:
        for name, parameter in model.get_submodule(path).named_parameters():
            if not parameter.is_floating_point():
                raise UserError(f"parts.{part}.method: {name} is quantized and cannot be trained in full")
        return {}

    def apply(self, model: nn.Module, path: str, plan: dict[str, LowRankSpec], name: str) -> list[str]:
        model.get_submodule(path).requires_grad_(True)
        return [path]


@ADAPTERS.register("frozen")
class Frozen(AdapterMethod):
    settings = frozenset()

    def plan(self, model: nn.Module, part: str, path: str, config: PartConfig) -> dict[str, LowRankSpec]:
        return {}

    def apply(self, model: nn.Module, path: str, plan: dict[str, LowRankSpec], name: str) -> list[str]:
        return []
