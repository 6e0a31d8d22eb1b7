"""VISION_ENCODERS: `model.vision_encoder.type` -> a function that builds the vision encoder.

The registry is declared outside `mmdora.models`, because importing that package imports torch and transformers, and a
config's names are checked before either is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmdora.core.registry import Registry

VISION_ENCODERS: Registry[Callable[..., Any]] = Registry(
    "vision encoder",
    built_in={
        "clip": "mmdora.models.vision_encoders.clip",
        "dinov2": "mmdora.models.vision_encoders.dinov2",
        "open_clip": "mmdora.models.vision_encoders.open_clip",
        "siglip": "mmdora.models.vision_encoders.siglip",
        "siglip2": "mmdora.models.vision_encoders.siglip",
    },
)
