"""DoRA (arXiv 2402.09353): a low-rank update of the weight's direction, and one trained magnitude per output row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mmdora.adapters.methods.base import ADAPTERS, PartPlan
from mmdora.adapters.methods.lora import LOW_RANK, LoRA
from mmdora.adapters.methods.magnitude import MAGNITUDE
from mmdora.core.config import PartConfig

if TYPE_CHECKING:
    from torch import nn

    from mmdora.models.architectures import Region


@ADAPTERS.register("dora")
class DoRA(LoRA):
    """DoRA (arXiv 2402.09353): W' = m ⊙ (W + sBA) / ‖W + sBA‖.

    `magnitude_targets` may differ from `targets` (Table 6 of the paper). A layer in both gets DoRA, a layer in
    `targets` alone gets LoRA, and a layer in `magnitude_targets` alone gets a magnitude only.
    """

    settings = LOW_RANK | {"magnitude_targets", "peft_dropout"}

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        from mmdora.adapters.targets import resolve_targets

        specs = super().plan(model, part, region, config).layers
        magnitudes = list(specs)
        if config.magnitude_targets is not None:
            magnitudes = resolve_targets(model, part, region, config, "magnitude_targets")
        for layer in magnitudes:
            specs[layer] = replace(specs.get(layer, MAGNITUDE), use_dora=True, peft_dropout=config.peft_dropout)
        return PartPlan(specs)
