"""Vision encoders, one file each; importing the package registers them all."""

from mmdora.vision_encoders import open_clip
from mmdora.vision_encoders.registry import VISION_ENCODERS

__all__ = ["VISION_ENCODERS", "open_clip"]
