"""Only DoRA's magnitude: one factor for every output row, the direction as it was."""

from __future__ import annotations

from torch import nn

from mmdora.adapters.methods.base import ADAPTERS, RATES, PartPlan
from mmdora.adapters.methods.lora import LoRA
from mmdora.adapters.spec import LowRankSpec
from mmdora.adapters.targets import resolve_targets
from mmdora.core.config import PartConfig
from mmdora.models.architectures import Region

MAGNITUDE = LowRankSpec(rank=0, alpha=1.0, use_dora=True)


@ADAPTERS.register("magnitude")
class Magnitude(LoRA):
    settings = RATES | {"targets", "exclude", "last_blocks"}

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        return PartPlan(dict.fromkeys(resolve_targets(model, part, region, config), MAGNITUDE))
