"""Pad images to a square, as LLaVA-1.5's own code does.

The Hugging Face conversions of LLaVA-1.5 come with CLIP's image processor, which crops the longer side. LLaVA pads the
image with the mean colour instead, and loses nothing. transformers implements that as `LlavaImageProcessor`, so
AutoProcessor saves and loads the changed processor like any other.

Source: https://github.com/haotian-liu/LLaVA (llava/mm_utils.py, expand2square).
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaImageProcessor, LlavaProcessor

from mmdora.core.errors import UserError

KEPT_SETTINGS = ("crop_size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def pad_to_square(processor: Any, name: str) -> None:
    """Make a processor pad images to a square before it resizes them to its crop size, in place.

    Mean, standard deviation and size do not change. `name` is the model's name for the error message. Raises UserError
    for a processor that does not turn an image into a single square.
    """
    side = _square_size(processor)
    if side is None:
        images = getattr(processor, "image_processor", processor)
        raise UserError(
            f"model.pad_to_square: {name} does not crop images to one square ({type(images).__name__} of a "
            f"{type(processor).__name__}), so there is nothing that padding would keep; remove the key"
        )
    settings = {key: getattr(processor.image_processor, key, None) for key in KEPT_SETTINGS}
    settings = {key: value for key, value in settings.items() if value is not None}
    processor.image_processor = LlavaImageProcessor(
        **settings, size={"height": side, "width": side}, do_center_crop=False, do_pad=True
    )


def _square_size(processor: Any) -> int | None:
    """Return the side [pixels] of the square that a LLaVA-1.5 processor makes of an image; None if it makes none."""
    if not isinstance(processor, LlavaProcessor):
        return None
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    height, width = size.get("height"), size.get("width")
    return height if height == width else None
