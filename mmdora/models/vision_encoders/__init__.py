"""Vision encoders, one file per type. Importing the package registers all of them."""

from mmdora.models.vision_encoders import clip, dinov2, open_clip, siglip
from mmdora.models.vision_encoders.registry import VISION_ENCODERS

__all__ = ["VISION_ENCODERS", "clip", "dinov2", "open_clip", "siglip"]
