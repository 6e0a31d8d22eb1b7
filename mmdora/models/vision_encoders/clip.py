"""The vision encoder `clip`: CLIP image towers of transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mmdora.models.vision_encoders.hub_towers import TowerFamily, load_tower
from mmdora.models.vision_encoders.registry import VISION_ENCODERS

CLIP = TowerFamily(
    "clip",
    "CLIPVisionModel",
    "CLIPVisionConfig",
    model_types=("clip", "clip_vision_model"),
    image_mean=OPENAI_CLIP_MEAN,
    image_std=OPENAI_CLIP_STD,
    overrides={},
)


@VISION_ENCODERS.register("clip")
def clip_encoder(
    name: str, pretrained: str | None = None, model_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a `CLIPVisionModel` from a hub id or directory; `pretrained` is a hub revision. Raises UserError."""
    return load_tower(CLIP, name, pretrained, model_config)[0]
