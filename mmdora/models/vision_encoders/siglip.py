"""The vision encoders `siglip` and `siglip2`: image towers of transformers without a class token.

SigLIP 2 checkpoints with a fixed resolution are SigLIP models in transformers. The NaFlex checkpoints (model type
`siglip2`) take packed patches instead of images, which no LLaVA class provides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from mmdora.models.vision_encoders.hub_towers import TowerFamily, load_tower
from mmdora.models.vision_encoders.registry import VISION_ENCODERS

SIGLIP = TowerFamily(
    "siglip",
    "SiglipVisionModel",
    "SiglipVisionConfig",
    model_types=("siglip", "siglip_vision_model"),
    image_mean=IMAGENET_STANDARD_MEAN,
    image_std=IMAGENET_STANDARD_STD,
    overrides={"vision_use_head": False},  # the pooling head, which no vision-language model reads
)


@VISION_ENCODERS.register("siglip")
def siglip_encoder(
    name: str, pretrained: str | None = None, model_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a `SiglipVisionModel` from a hub id or directory; `pretrained` is a hub revision. Raises UserError."""
    return load_tower(SIGLIP, name, pretrained, model_config)[0]


@VISION_ENCODERS.register("siglip2")
def siglip2_encoder(
    name: str, pretrained: str | None = None, model_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a SigLIP 2 checkpoint with a fixed resolution (not NaFlex) like `siglip`. Raises UserError."""
    return load_tower(replace(SIGLIP, type="siglip2"), name, pretrained, model_config)[0]
