"""`full`: every weight of the part is trained. `frozen`: none is."""

from __future__ import annotations

from torch import nn

from mmdora.adapters.base import ADAPTERS, AdapterMethod
from mmdora.config import PartConfig


@ADAPTERS.register("full")
class Full(AdapterMethod):
    def adapt(self, model: nn.Module, part: str, targets: list[str], config: PartConfig, name: str) -> list[str]:
        module = model.get_submodule(part)
        module.requires_grad_(True)
        return [part]


@ADAPTERS.register("frozen")
class Frozen(AdapterMethod):
    def adapt(self, model: nn.Module, part: str, targets: list[str], config: PartConfig, name: str) -> list[str]:
        return []
