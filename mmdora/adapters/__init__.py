"""Adapters: the methods (LoRA, DoRA and others), the layers they run in, and the files they are saved in.

Names that need torch load on first use, so that `ADAPTERS` can be read without importing it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmdora.adapters.methods import ADAPTERS, AdapterMethod
from mmdora.adapters.spec import LowRankSpec

if TYPE_CHECKING:
    from mmdora.adapters.layers.base import AdapterLayer
    from mmdora.adapters.layers.wrapping import adapter_layers, tensor_shapes, wrap
    from mmdora.adapters.targets import resolve_targets

_MODULES = {
    "AdapterLayer": "mmdora.adapters.layers.base",
    "adapter_layers": "mmdora.adapters.layers.wrapping",
    "resolve_targets": "mmdora.adapters.targets",
    "tensor_shapes": "mmdora.adapters.layers.wrapping",
    "wrap": "mmdora.adapters.layers.wrapping",
}

__all__ = [
    "ADAPTERS",
    "AdapterLayer",
    "AdapterMethod",
    "LowRankSpec",
    "adapter_layers",
    "resolve_targets",
    "tensor_shapes",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
