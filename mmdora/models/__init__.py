"""Load, compose and describe models: parts, vision encoders, projectors, new tokens.

Importing this package registers mmdora's own model classes with the Auto classes of transformers, so that
`from_pretrained` loads saved models that use them. `import mmdora` alone does not.
"""

from mmdora.models import llava_resampler, vision_encoders

__all__ = ["llava_resampler", "vision_encoders"]
