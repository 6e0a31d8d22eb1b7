"""VISION_ENCODERS: `model.vision_encoder.type` → a function that builds the tower from the entry's other keys."""

from collections.abc import Callable
from typing import Any

from mmdora.core.registry import Registry

VISION_ENCODERS: Registry[Callable[..., Any]] = Registry("vision encoder")
