"""Vision encoders, one file each; importing the package registers them all."""

from mmdora.models.vision_encoders import clip, dinov2, open_clip, siglip
from mmdora.models.vision_encoders.registry import VISION_ENCODERS

__all__ = ["VISION_ENCODERS", "clip", "dinov2", "open_clip", "siglip"]
