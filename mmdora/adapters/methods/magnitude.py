"""DoRA's magnitude alone: one factor per output row; the direction stays frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdora.adapters.methods.base import ADAPTERS, RATES, PartPlan
from mmdora.adapters.methods.lora import LoRA
from mmdora.adapters.spec import LowRankSpec
from mmdora.core.config import PartConfig

if TYPE_CHECKING:
    from torch import nn

    from mmdora.models.architectures import Region

MAGNITUDE = LowRankSpec(rank=0, alpha=1.0, use_dora=True)


@ADAPTERS.register("magnitude")
class Magnitude(LoRA):
    """DoRA's magnitude alone: W' = m ⊙ W / ‖W‖, with one trained m per output row."""

    settings = RATES | {"targets", "exclude", "last_blocks"}

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        from mmdora.adapters.targets import resolve_targets

        return PartPlan(dict.fromkeys(resolve_targets(model, part, region, config), MAGNITUDE))
