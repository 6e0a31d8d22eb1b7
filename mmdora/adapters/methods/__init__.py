"""Adapter methods, one file each; importing the package registers them all."""

from mmdora.adapters.methods import dora, dvora, full, lora, magnitude
from mmdora.adapters.methods.base import ADAPTERS, AdapterMethod, PartPlan

__all__ = ["ADAPTERS", "AdapterMethod", "PartPlan", "dora", "dvora", "full", "lora", "magnitude"]
