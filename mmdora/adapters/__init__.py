"""Adapter methods, one file each; importing the package registers them all."""

from mmdora.adapters import dora, dvora, lora, magnitude, whole
from mmdora.adapters.base import ADAPTERS, AdapterMethod, LowRankSpec
from mmdora.adapters.layer import AdapterLayer
from mmdora.adapters.targets import resolve_targets
from mmdora.adapters.wrapping import adapter_layers, tensor_shapes, wrap

__all__ = [
    "ADAPTERS",
    "AdapterLayer",
    "AdapterMethod",
    "LowRankSpec",
    "adapter_layers",
    "dora",
    "dvora",
    "lora",
    "magnitude",
    "resolve_targets",
    "tensor_shapes",
    "whole",
    "wrap",
]
