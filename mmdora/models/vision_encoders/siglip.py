"""SigLIP and SigLIP 2 image towers as transformers has them. They have no class token.

SigLIP 2's checkpoints of a fixed resolution are SigLIP models to transformers. The NaFlex ones (model type `siglip2`)
take packed patches in place of pictures, which no LLaVA class gives them.
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
    overrides={"vision_use_head": False},  # the pooling head: nothing in a vision-language model reads it
)


@VISION_ENCODERS.register("siglip")
def siglip_encoder(
    name: str, pretrained: str | None = None, model_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """A `SiglipVisionModel` of a hub id or directory; `pretrained` is a revision of the hub. Raises UserError."""
    return load_tower(SIGLIP, name, pretrained, model_config)[0]


@VISION_ENCODERS.register("siglip2")
def siglip2_encoder(
    name: str, pretrained: str | None = None, model_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The same for a SigLIP 2 checkpoint of a fixed resolution (not NaFlex). Raises UserError."""
    return load_tower(replace(SIGLIP, type="siglip2"), name, pretrained, model_config)[0]
