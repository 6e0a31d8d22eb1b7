"""LoRA, DoRA and their relatives: the methods, the layers they run in, and the files they are saved in."""

from mmdora.adapters.layers.base import AdapterLayer
from mmdora.adapters.layers.wrapping import adapter_layers, tensor_shapes, wrap
from mmdora.adapters.methods import ADAPTERS, AdapterMethod
from mmdora.adapters.spec import LowRankSpec
from mmdora.adapters.targets import resolve_targets

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
