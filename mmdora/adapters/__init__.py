"""Adapter methods, one file each; importing the package registers them all."""

from mmdora.adapters import dora, lora, whole
from mmdora.adapters.base import ADAPTERS, AdapterLayer, AdapterMethod, LowRankSpec, adapter_layers

__all__ = [
    "ADAPTERS",
    "AdapterLayer",
    "AdapterMethod",
    "LowRankSpec",
    "adapter_layers",
    "dora",
    "lora",
    "whole",
]
