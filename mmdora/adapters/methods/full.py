"""`full`: every weight of the part is trained. `frozen`: none is."""

from __future__ import annotations

from torch import nn

from mmdora.adapters.methods.base import ADAPTERS, RATES, AdapterMethod, PartPlan
from mmdora.core.config import PartConfig
from mmdora.core.errors import UserError
from mmdora.models.architectures import Region, is_inside
from mmdora.models.blocks import last_blocks


@ADAPTERS.register("full")
class Full(AdapterMethod):
    settings = RATES | {"last_blocks"}

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        whole = region.whole_modules(model)
        if config.last_blocks is not None:
            whole = last_blocks(model, part, region, config.last_blocks)
        for name, parameter in region.named_parameters(model):
            trained = any(is_inside(name, module) for module in whole)
            if not trained and config.last_blocks is None:
                raise UserError(
                    f"parts.{part}.method: {name} lies right beside {region.without[0]}, which is another part; name "
                    "the module around both to train them in full"
                )
            if trained and not parameter.is_floating_point():
                raise UserError(f"parts.{part}.method: {name} is quantized and cannot be trained in full")
        return PartPlan(whole=whole)


@ADAPTERS.register("frozen")
class Frozen(AdapterMethod):
    settings = frozenset()

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        return PartPlan()
