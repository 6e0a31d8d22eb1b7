"""`full` trains every weight of a part; `frozen` trains none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdora.adapters.methods.base import ADAPTERS, RATES, AdapterMethod, PartPlan
from mmdora.core.config import PartConfig
from mmdora.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from mmdora.models.architectures import Region


@ADAPTERS.register("full")
class Full(AdapterMethod):
    """Full fine-tuning: every weight of the part is trained."""

    settings = RATES | {"last_blocks"}

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        from mmdora.models.architectures import is_inside
        from mmdora.models.blocks import last_blocks

        whole = region.whole_modules(model)
        if config.last_blocks is not None:
            whole = last_blocks(model, part, region, config.last_blocks)
        for name, parameter in region.named_parameters(model):
            trained = any(is_inside(name, module) for module in whole)
            if not trained and config.last_blocks is None:
                raise UserError(
                    f"parts.{part}.method: {name} is next to {region.without[0]}, which belongs to another part; name "
                    "the module that contains both to train them in full"
                )
            if trained and not parameter.is_floating_point():
                raise UserError(f"parts.{part}.method: {name} is quantized and cannot be trained in full")
        return PartPlan(whole=whole)


@ADAPTERS.register("frozen")
class Frozen(AdapterMethod):
    """No weight of the part is trained."""

    settings = frozenset()

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        return PartPlan()
