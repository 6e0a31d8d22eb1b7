"""DVoRA (§5.5 of arXiv 2402.09353): DoRA's magnitude, with VeRA (arXiv 2310.11454) for the direction.

W' = m ⊙ (W + Λb B Λd A) / ‖W + Λb B Λd A‖. A and B are random, frozen, and shared by all layers of a part. The
trainable parameters are the diagonals d [r] and b [out], and m [out].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mmdora.adapters.methods.base import ADAPTERS, RATES, PartPlan
from mmdora.adapters.methods.lora import LoRA, layer_seed
from mmdora.adapters.spec import LowRankSpec
from mmdora.core.config import PartConfig
from mmdora.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from mmdora.models.architectures import Region


@ADAPTERS.register("dvora")
class DVoRA(LoRA):
    """DVoRA (§5.5 of arXiv 2402.09353): DoRA's magnitude, with VeRA (arXiv 2310.11454) for the direction."""

    settings = RATES | {"rank", "dropout", "targets", "exclude", "last_blocks", "peft_dropout", "forward"}

    def plan(self, model: nn.Module, part: str, region: Region, config: PartConfig) -> PartPlan:
        from mmdora.adapters.layers.linear import LinearLayer
        from mmdora.adapters.layers.wrapping import layer_class
        from mmdora.adapters.targets import resolve_targets

        spec = LowRankSpec(
            rank=config.rank,
            alpha=config.rank,  # VeRA has no scale: s = alpha / rank = 1
            dropout=config.dropout,
            use_dora=True,
            use_vera=True,
            peft_dropout=config.peft_dropout,
            forward=config.forward,
        )
        plan = dict.fromkeys(resolve_targets(model, part, region, config), spec)
        modules = dict(model.named_modules())
        for layer in plan:
            kind = layer_class(modules[layer]) if layer in modules else None
            if kind is None or not issubclass(kind, LinearLayer):
                raise UserError(f"parts.{part}.targets: dvora adapts linear layers only, and {layer} is not linear")
        return PartPlan(plan)

    def apply(self, model: nn.Module, region: Region, layers: dict[str, LowRankSpec], name: str) -> None:
        import torch
        from torch import nn

        from mmdora.adapters.layers.base import SharedVeRA
        from mmdora.adapters.layers.wrapping import wrap

        wrapped = {layer: wrap(model, layer) for layer in layers}
        rank = next(iter(layers.values())).rank
        sizes = [layer.shapes(layer, rank) for layer in wrapped.values()]
        device = next(iter(wrapped.values())).weight.device
        initial_device = "meta" if device.type == "meta" else "cpu"
        a = torch.empty(rank, max(size.a[1] for size in sizes), device=initial_device)
        b = torch.empty(max(size.b[0] for size in sizes), rank, device=initial_device)
        generator = torch.Generator().manual_seed(layer_seed(region.path))
        for matrix in (a, b):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        shared = SharedVeRA(a.to(device), b.to(device))
        for layer, adapter in wrapped.items():
            adapter.add_adapter(name, layers[layer], shared=shared)
