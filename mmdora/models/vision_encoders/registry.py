"""The registry that the files of this package register themselves in; declared in mmdora/core/vision_encoders.py."""

from mmdora.core.vision_encoders import VISION_ENCODERS

__all__ = ["VISION_ENCODERS"]
