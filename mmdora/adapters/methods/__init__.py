"""Adapter methods, one file each; importing the package registers them all.

No file here imports torch before a method is used, so that a config's methods and their settings can be checked first.
"""

from mmdora.adapters.methods import dora, dvora, full, lora, magnitude
from mmdora.adapters.methods.base import ADAPTERS, AdapterMethod, PartPlan

__all__ = ["ADAPTERS", "AdapterMethod", "PartPlan", "dora", "dvora", "full", "lora", "magnitude"]
