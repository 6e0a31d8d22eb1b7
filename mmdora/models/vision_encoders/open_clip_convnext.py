"""OpenCLIP's ConvNeXt towers: the last stage's features are the patches, as in ConvLLaVA (arXiv 2405.15738).

Earlier stages have other widths and resolutions, so the hidden states are those of the last stage: what its blocks
begin with, and the output of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmdora.core.errors import UserError
from mmdora.models.vision_encoders.open_clip_timm import OpenCLIPTimmConfig
from mmdora.models.vision_encoders.open_clip_weights import pretrained_visual


class OpenCLIPConvNextConfig(OpenCLIPTimmConfig):
    """A patch is what one place of the last stage sees: its stride, in pixels; `num_hidden_layers` counts the last
    stage's blocks."""

    model_type = "open_clip_convnext_vision"

    def __init__(self, timm_model_name: str = "convnext_base", patch_size: int = 32, **kwargs: Any):
        super().__init__(timm_model_name, patch_size=patch_size, **kwargs)


class OpenCLIPConvNextModel(PreTrainedModel):
    """pixel_values [batch, 3, image_size, image_size] → hidden states [batch, patches, hidden_size], row by row."""

    config_class = OpenCLIPConvNextConfig
    base_model_prefix = "open_clip_convnext"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # there is no attention that another implementation could compute
    _no_split_modules = ("ConvNeXtBlock",)
    trunk: Any  # timm's class

    def __init__(self, config: OpenCLIPConvNextConfig):
        super().__init__(config)
        self.trunk = build_trunk(config.timm_model_name)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """timm's constructor has initialised the trunk; from_pretrained must not undo that for present weights."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`hidden_states` always holds what the last stage begins with and every block's output: the LLaVA classes
        index them."""
        x = self.trunk.stem(pixel_values.to(self.dtype))
        hidden_states: list[Tensor] = []
        for stage in self.trunk.stages:
            x = stage.downsample(x)
            hidden_states = [_patches(x)]
            for block in stage.blocks:
                x = (
                    checkpoint(block, x, use_reentrant=False)
                    if self.gradient_checkpointing and self.training
                    else block(x)
                )
                hidden_states.append(_patches(x))
        last = hidden_states[-1]
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=last.mean(1), hidden_states=tuple(hidden_states)
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.stem


def _patches(x: Tensor) -> Tensor:
    """[batch, width, rows, columns] → [batch, rows · columns, width]"""
    return x.flatten(2).transpose(1, 2)


def build_trunk(timm_model_name: str) -> Any:
    """The trunk with random weights and without its head and final norm, which stand behind what is read."""
    import timm

    trunk = timm.create_model(timm_model_name, num_classes=0, global_pool="")
    trunk.norm_pre = trunk.head = nn.Identity()
    return trunk


def convnext_encoder(name: str, pretrained: str | None, vision_cfg: dict[str, Any]) -> OpenCLIPConvNextModel:
    """The OpenCLIP tower `name`; null `pretrained`: random weights. Raises UserError."""
    trunk = build_trunk(vision_cfg["timm_model_name"])
    size, stride = vision_cfg.get("image_size", 224), trunk.feature_info[-1]["reduction"]
    if not isinstance(size, int) or size % stride:
        raise UserError(f"{name!r} reads pictures of {size} px, which its stride of {stride} px does not divide")
    config = OpenCLIPConvNextConfig(
        vision_cfg["timm_model_name"],
        image_size=size,
        patch_size=stride,
        hidden_size=trunk.num_features,
        num_hidden_layers=len(trunk.stages[-1].blocks),
    )
    model = OpenCLIPConvNextModel(config)
    if pretrained is not None:
        source = pretrained_visual(name, pretrained)
        config.image_mean, config.image_std = list(source.image_mean), list(source.image_std)
        wanted = model.trunk.state_dict().keys()
        model.trunk.load_state_dict({k: v for k, v in source.trunk.state_dict().items() if k in wanted})
    return model.to(torch.float32)


AutoConfig.register(OpenCLIPConvNextConfig.model_type, OpenCLIPConvNextConfig)
AutoModel.register(OpenCLIPConvNextConfig, OpenCLIPConvNextModel)
