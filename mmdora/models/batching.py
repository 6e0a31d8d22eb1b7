"""Models of transformers that compute something else for a sample in a batch than for the sample alone.

Mllama is corrected. For the others no input gives the right result, so that they need batches of one sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmdora.core.errors import UserError

# The image features depend on the other images of the batch: Emu3's tokenizer sees the padding of smaller images.
SHARED_IMAGES = ("emu3", "hunyuan_vl")
# The positions of the tokens do not take padding on the left into account.
RIGHT_PADDED = ("blip", "git", "mistral_large4")


def needs_single_samples(config: Any, left_padded: bool) -> bool:
    """Whether a model with this config computes other results in a batch, padded on the left or the right."""
    family = getattr(config, "model_type", None)
    return family in SHARED_IMAGES or (left_padded and family in RIGHT_PADDED)


def check_micro_batch_size(config: Any, micro_batch_size: int) -> None:
    """Raise UserError if a model with this config would be trained on other image features than it has in use."""
    if micro_batch_size > 1 and needs_single_samples(config, left_padded=False):
        raise UserError(
            f"training.micro_batch_size: {config.model_type} computes other features for an image if the batch holds "
            "more images; set it to 1"
        )


def separate_samples(model: nn.Module) -> None:
    """Make every sample of a batch compute what it computes alone, in place. Does nothing for most families.

    Mllama's cross-attention layers are skipped for a sample without images, and tokens before the first image attend to
    all images of their sample. In a batch, transformers applies the layers to all samples and lets these tokens attend
    to the images that pad the batch.
    """
    module: Any
    for module in model.modules():
        if type(module).__name__ == "MllamaForConditionalGeneration":
            vision = module.config.vision_config
            size = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)  # tokens per image
            for layer in module.modules():
                if type(layer).__name__ == "MllamaCrossAttentionDecoderLayer" and not hasattr(
                    layer, "tokens_per_image"
                ):
                    layer.tokens_per_image = size
                    layer.register_forward_pre_hook(_attend_to_own_images, with_kwargs=True)
                    layer.register_forward_hook(_skip_without_images, with_kwargs=True)


def _attend_to_own_images(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Exclude the images to which no token of the sample attends, which are padding, for tokens before the first image.

    `cross_attention_mask` [samples, 1, tokens, image tokens] is 0 where attention is allowed, and for these tokens 0
    everywhere. `full_text_row_masked_out_mask` [samples, 1, tokens, 1] is 0 for these tokens and 1 for the others.
    """
    mask, after_image = kwargs.get("cross_attention_mask"), kwargs.get("full_text_row_masked_out_mask")
    if mask is None or after_image is None:
        return args, kwargs
    attended = ((mask == 0) & after_image.bool()).any(dim=2, keepdim=True)
    attended = attended.unflatten(-1, (-1, layer.tokens_per_image))
    own = attended.any(dim=-1, keepdim=True).expand_as(attended).flatten(-2)
    excluded = ~own & ~after_image.bool() & own.any(dim=-1, keepdim=True)
    return args, kwargs | {"cross_attention_mask": mask.masked_fill(excluded, torch.finfo(mask.dtype).min)}


def _skip_without_images(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Return the layer's input for samples of which no token attends to an image."""
    after_image = kwargs.get("full_text_row_masked_out_mask")
    if after_image is None:
        return output
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return torch.where(after_image[:, 0].any(dim=1, keepdim=True), output, hidden_states)
