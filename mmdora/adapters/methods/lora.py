"""LoRA (arXiv 2106.09685): W' = W + sBA."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

from mmdora.adapters.methods.base import ADAPTERS, RATES, AdapterMethod, PartPlan
from mmdora.adapters.spec import LowRankSpec
from mmdora.core.config import PartConfig
from mmdora.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from mmdora.models.architectures import Region

PATTERNS = {"rank_pattern", "alpha_pattern"}
LOW_RANK = RATES | PATTERNS | {"rank", "alpha", "dropout", "use_rslora", "targets", "exclude", "last_blocks", "forward"}


def layer_seed(path: str) -> int:
    """Return the seed of a layer's initial A. It depends on torch's seed and the layer's path, not on the order in
    which layers are built."""
    import torch

    return (torch.initial_seed() ^ zlib.crc32(path.encode())) % 2**63


@ADAPTERS.register("lora")
class LoRA(AdapterMethod):
    """LoRA (arXiv 2106.09685): W' = W + sBA with s = alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""

    settings = LOW_RANK

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        from mmdora.adapters.layers.wrapping import takes_dropout
        from mmdora.adapters.targets import pattern_value, resolve_targets

        spec = LowRankSpec(config.rank, config.alpha, config.dropout, config.use_rslora, forward=config.forward)
        layers = resolve_targets(model, part, region, config)
        if config.dropout and (without := [layer for layer in layers if not takes_dropout(model, layer)]):
            raise UserError(f"parts.{part}.dropout: {without[0]} has no input to drop; exclude it or set dropout to 0")
        return PartPlan(
            {
                layer: replace(
                    spec,
                    rank=pattern_value(config.rank_pattern, layer, config.rank),
                    alpha=pattern_value(config.alpha_pattern, layer, config.alpha),
                )
                for layer in layers
            }
        )

    def apply(self, model: nn.Module, region: Region, layers: dict[str, LowRankSpec], name: str) -> None:
        from mmdora.adapters.layers.wrapping import wrap

        for layer, spec in layers.items():
            wrap(model, layer).add_adapter(name, spec, layer_seed(layer))
