"""DoRA (arXiv 2402.09353): LoRA moves the weight's direction, a vector of its own scales each output row."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mmdora.adapters.methods.base import ADAPTERS, PartPlan
from mmdora.adapters.methods.lora import LOW_RANK, LoRA
from mmdora.adapters.methods.magnitude import MAGNITUDE
from mmdora.adapters.targets import resolve_targets
from mmdora.core.config import PartConfig
from mmdora.models.architectures import Region


@ADAPTERS.register("dora")
class DoRA(LoRA):
    """DoRA (arXiv 2402.09353): W' = m ⊙ (W + sBA) / ‖W + sBA‖.

    `magnitude_targets` may differ from `targets` (Table 6 of the paper): a layer in both has DoRA, one in `targets`
    alone has LoRA, and one in `magnitude_targets` alone has nothing but a magnitude.
    """

    settings = LOW_RANK | {"magnitude_targets", "peft_dropout"}

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        specs = super().plan(model, part, region, config).layers
        magnitudes = list(specs)
        if config.magnitude_targets is not None:
            magnitudes = resolve_targets(model, part, region, config, "magnitude_targets")
        for layer in magnitudes:
            specs[layer] = replace(specs.get(layer, MAGNITUDE), use_dora=True, peft_dropout=config.peft_dropout)
        return PartPlan(specs)
