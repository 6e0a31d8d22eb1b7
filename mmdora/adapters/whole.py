"""`full`: every weight of the part is trained. `frozen`: none is."""

from __future__ import annotations

from torch import nn

from mmdora.adapters.base import ADAPTERS, RATES, AdapterMethod, LowRankSpec
from mmdora.architectures import Region, is_inside
from mmdora.config import PartConfig
from mmdora.errors import UserError


@ADAPTERS.register("full")
class Full(AdapterMethod):
    settings = RATES

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> dict[str, LowRankSpec]:
        whole = region.whole_modules(model)
        for name, parameter in region.named_parameters(model):
            if not any(is_inside(name, module) for module in whole):
                raise UserError(
                    f"parts.{part}.method: {name} lies right beside {region.without[0]}, which is another part; name "
                    "the module around both to train them in full"
                )
            if not parameter.is_floating_point():
                raise UserError(f"parts.{part}.method: {name} is quantized and cannot be trained in full")
        return {}

    def apply(self, model: nn.Module, region: Region, plan: dict[str, LowRankSpec], name: str) -> list[str]:
        for _, parameter in region.named_parameters(model):
            parameter.requires_grad_(True)
        return region.whole_modules(model)


@ADAPTERS.register("frozen")
class Frozen(AdapterMethod):
    settings = frozenset()

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> dict[str, LowRankSpec]:
        return {}

    def apply(self, model: nn.Module, region: Region, plan: dict[str, LowRankSpec], name: str) -> list[str]:
        return []
