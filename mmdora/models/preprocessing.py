"""Pictures padded to a square, as LLaVA-1.5's own code prepares them.

The Hugging Face conversions of LLaVA-1.5 come with CLIP's image processor, which crops the longer side away. LLaVA pads
the picture with the mean colour and loses nothing. transformers has that rule as `LlavaImageProcessor`, so a processor
that got it here is saved and loaded by AutoProcessor like any other.

Source: https://github.com/haotian-liu/LLaVA (llava/mm_utils.py, expand2square).
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaImageProcessor, LlavaProcessor

from mmdora.core.errors import UserError

KEPT = ("crop_size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def pad_to_square(processor: Any, name: str) -> None:
    """Make the processor pad pictures to a square [height = width, pixels of its crop], in place.

    Mean, standard deviation and size stay its own. Raises UserError for a processor that does not make one square of a
    picture; `name` is the model's in that message.
    """
    side = _side(processor)
    if side is None:
        images = getattr(processor, "image_processor", processor)
        raise UserError(
            f"model.pad_to_square: the pictures of {name} do not become one square ({type(images).__name__} of a "
            f"{type(processor).__name__}), so no side is cropped that padding would keep; leave the key out"
        )
    settings = {key: getattr(processor.image_processor, key, None) for key in KEPT}
    settings = {key: value for key, value in settings.items() if value is not None}
    processor.image_processor = LlavaImageProcessor(
        **settings, size={"height": side, "width": side}, do_center_crop=False, do_pad=True
    )


def _side(processor: Any) -> int | None:
    """Of the one square [pixels] that a LLaVA-1.5's image processor makes of any picture; None where it makes none."""
    if not isinstance(processor, LlavaProcessor):
        return None
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    height, width = size.get("height"), size.get("width")
    return height if height == width else None
