"""The vision encoder `dinov2`: DINOv2 towers of transformers, at the resolution of their preprocessor.

The checkpoints have position embeddings for 518 px and a preprocessor for 224 px, and transformers interpolates at each
call. Here the tower stores the interpolated embeddings, so that the LLaVA class reads the right number of patches from
`image_size`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mmdora.models.vision_encoders.hub_towers import TowerFamily, load_tower
from mmdora.models.vision_encoders.registry import VISION_ENCODERS

DINOV2 = TowerFamily(
    "dinov2",
    "Dinov2Model",
    "Dinov2Config",
    model_types=("dinov2",),
    image_mean=IMAGENET_DEFAULT_MEAN,
    image_std=IMAGENET_DEFAULT_STD,
    overrides={},
)


@VISION_ENCODERS.register("dinov2")
def dinov2_encoder(
    name: str, pretrained: str | None = None, model_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a `Dinov2Model` from a hub id or directory; `pretrained` is a hub revision. Raises UserError.

    DINOv2 with registers is an error: LLaVA classes drop one class token and would read the registers as patches.
    """
    tower, size = load_tower(DINOV2, name, pretrained, model_config)
    if size is not None and size != tower.config.image_size:
        set_image_size(tower, size)
    return tower


def set_image_size(tower: PreTrainedModel, size: int) -> None:
    """Set the tower's resolution to `size` [pixels], in place. Its output for images of that size does not change."""
    embeddings = tower.embeddings
    patches = (size // tower.config.patch_size) ** 2
    with torch.no_grad():
        like = embeddings.position_embeddings.new_empty(1, patches + 1, tower.config.hidden_size)
        table = embeddings.interpolate_pos_encoding(like, size, size)
    embeddings.position_embeddings = nn.Parameter(table.clone())
    embeddings.patch_embeddings.image_size = (size, size)
    embeddings.patch_embeddings.num_patches = patches
    tower.config.image_size = size
