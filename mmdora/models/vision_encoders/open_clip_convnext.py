"""OpenCLIP's ConvNeXt towers: the features of the last stage are the patches, as in ConvLLaVA (arXiv 2405.15738).

Earlier stages have other widths and resolutions, so the hidden states are those of the last stage only: the input of
its first block and the output of each block.
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
    """`patch_size` is the stride of the last stage in pixels; `num_hidden_layers` counts the last stage's blocks."""

    model_type = "open_clip_convnext_vision"

    def __init__(self, timm_model_name: str = "convnext_base", patch_size: int = 32, **kwargs: Any):
        super().__init__(timm_model_name, patch_size=patch_size, **kwargs)


class OpenCLIPConvNextModel(PreTrainedModel):
    """Map pixel_values [batch, 3, image_size, image_size] to hidden states [batch, patches, hidden_size].

    The patches are in row-major order.
    """

    config_class = OpenCLIPConvNextConfig
    base_model_prefix = "open_clip_convnext"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # it has no attention
    _no_split_modules = ("ConvNeXtBlock",)
    trunk: Any  # a class of timm

    def __init__(self, config: OpenCLIPConvNextConfig):
        super().__init__(config)
        self.trunk = build_trunk(config.timm_model_name)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Do nothing: timm's constructor initialises the trunk, and from_pretrained must not overwrite that."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return all hidden states, which LLaVA classes index: the last stage's input and the output of each block."""
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
    """Reshape [batch, width, rows, columns] to [batch, rows · columns, width]."""
    return x.flatten(2).transpose(1, 2)


def build_trunk(timm_model_name: str) -> Any:
    """Return the trunk with random weights, without the final norm and the head behind the hidden states."""
    import timm

    trunk = timm.create_model(timm_model_name, num_classes=0, global_pool="")
    trunk.norm_pre = trunk.head = nn.Identity()
    return trunk


def convnext_encoder(name: str, pretrained: str | None, vision_cfg: dict[str, Any]) -> OpenCLIPConvNextModel:
    """Return the OpenCLIP tower `name`, with random weights if `pretrained` is None. Raises UserError."""
    trunk = build_trunk(vision_cfg["timm_model_name"])
    size, stride = vision_cfg.get("image_size", 224), trunk.feature_info[-1]["reduction"]
    if not isinstance(size, int) or size % stride:
        raise UserError(f"{name!r}: its stride of {stride} px does not divide its image size of {size} px")
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
