"""Models: their parts, loading, composing, vision encoders, projectors and new tokens.

Importing this package registers mmdora's own model classes with transformers' Auto classes.
"""

from mmdora.models import llava_resampler, vision_encoders

__all__ = ["llava_resampler", "vision_encoders"]
