"""`full`: every weight of the part is trained. `frozen`: none is."""

from __future__ import annotations

from torch import nn

from mmdora.adapters.base import ADAPTERS, RATES, AdapterMethod, Plan
from mmdora.blocks import last_blocks
from mmdora.config import PartConfig
from mmdora.errors import UserError


@ADAPTERS.register("full")
class Full(AdapterMethod):
    settings = RATES | {"last_blocks"}

    def plan(self, model: nn.Module, part: str, path: str, config: PartConfig) -> Plan:
        whole = [path] if config.last_blocks is None else last_blocks(model, part, path, config.last_blocks)
        for module in whole:
            for name, parameter in model.get_submodule(module).named_parameters(prefix=module):
                if not parameter.is_floating_point():
                    raise UserError(f"parts.{part}.method: {name} is quantized and cannot be trained in full")
        return Plan(whole=whole)


@ADAPTERS.register("frozen")
class Frozen(AdapterMethod):
    settings = frozenset()

    def plan(self, model: nn.Module, part: str, path: str, config: PartConfig) -> Plan:
        return Plan()
