"""OpenCLIP image towers with a vision transformer of timm: SigLIP, SigLIP 2 and EVA.

The tower is timm's trunk inside a small `PreTrainedModel`, without pooling and projection heads, which no
vision-language model reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmdora.core.errors import UserError
from mmdora.models.vision_encoders.open_clip_weights import pretrained_visual


class OpenCLIPTimmConfig(PretrainedConfig):
    """`timm_model_name` names the trunk; LLaVA classes read the other fields."""

    model_type = "open_clip_timm_vision"

    def __init__(
        self,
        timm_model_name: str = "vit_base_patch16_siglip_224",
        image_size: int = 224,
        patch_size: int = 16,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ):
        self.timm_model_name = timm_model_name
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.image_mean = image_mean
        self.image_std = image_std
        super().__init__(**kwargs)


class OpenCLIPTimmModel(PreTrainedModel):
    """Map pixel_values [batch, 3, image_size, image_size] to hidden states [batch, prefix + patches, hidden_size].

    The prefix is one class token in EVA and empty in SigLIP.
    """

    config_class = OpenCLIPTimmConfig
    base_model_prefix = "open_clip_timm"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("Block", "EvaBlock")
    trunk: Any  # a class of timm

    def __init__(self, config: OpenCLIPTimmConfig):
        super().__init__(config)
        self.trunk = build_trunk(config.timm_model_name)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Initialise only what no checkpoint holds: timm's constructor has initialised the weights."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return all hidden states, which LLaVA classes index: the embeddings and the output of each block."""
        trunk = self.trunk
        x = trunk._pos_embed(trunk.patch_embed(pixel_values.to(self.dtype)))
        options: dict[str, Any] = {}
        if isinstance(x, tuple):  # EVA applies rotary embeddings in every block
            x, rope = x
            options = {"rope": rope} if rope is not None else {}
        x = trunk.norm_pre(x)
        hidden_states = [x]
        for block in trunk.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, **options)
            else:
                x = block(x, **options)
            hidden_states.append(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=x.mean(1), hidden_states=tuple(hidden_states)
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.patch_embed

    def to_siglip(self) -> PreTrainedModel:
        """Return the equivalent SigLIP vision model of transformers. Raises UserError if SigLIP lacks a layer of it."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        trunk, cfg = self.trunk, self.config
        block = trunk.blocks[0]
        act = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh"}.get(type(block.mlp.act).__name__)
        config = SiglipVisionConfig(
            hidden_size=cfg.hidden_size,
            intermediate_size=getattr(getattr(block.mlp, "fc1", None), "out_features", 0),
            num_hidden_layers=cfg.num_hidden_layers,
            num_attention_heads=block.attn.num_heads,
            image_size=cfg.image_size,
            patch_size=cfg.patch_size,
            hidden_act=act or "gelu",
            layer_norm_eps=block.norm1.eps,
            vision_use_head=False,
        )
        siglip = SiglipVisionModel(config)
        # Some releases of transformers wrap the tower in `vision_model.`; the names inside are the same.
        prefix = "vision_model." if any(k.startswith("vision_model.") for k in siglip.state_dict()) else ""
        state = {prefix + key: tensor for key, tensor in _siglip_state(trunk.state_dict()).items()}
        same = {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in siglip.state_dict().items()}
        if act is None or not same:
            raise UserError(f"the trunk {cfg.timm_model_name!r} has no equivalent in transformers' SiglipVisionModel")
        siglip.load_state_dict(state)
        return siglip.to(self.dtype).train(self.training)


_SIGLIP_NAMES = [
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("blocks.", "encoder.layers."),
    (".attn.proj.", ".self_attn.out_proj."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
]


def _siglip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for timm_name, siglip_name in _SIGLIP_NAMES:
            key = key.replace(timm_name, siglip_name)
        if ".attn.qkv." in key:
            for name, chunk in zip("qkv", tensor.chunk(3), strict=True):
                out[key.replace(".attn.qkv.", f".self_attn.{name}_proj.")] = chunk.contiguous()
        elif key.startswith("norm."):
            out[f"post_layernorm.{key.removeprefix('norm.')}"] = tensor
        elif key == "embeddings.position_embedding.weight":
            out[key] = tensor[0]
        else:
            out[key] = tensor
    return out


def build_trunk(timm_model_name: str) -> Any:
    """Return the trunk with random weights and without heads. Raises UserError if it is no plain transformer."""
    import timm

    trunk = timm.create_model(timm_model_name, num_classes=0, global_pool="")
    plain = isinstance(trunk, timm.models.vision_transformer.VisionTransformer | timm.models.eva.Eva)
    if not plain or getattr(trunk, "rope_mixed", False):
        raise UserError(
            f"OpenCLIP's timm trunk {timm_model_name!r} ({type(trunk).__name__}) is not a plain vision transformer: "
            "LLaVA classes need one sequence of patches per layer; use a ViT, SigLIP, EVA or ConvNeXt tower"
        )
    return join_biases(trunk)


def join_biases(trunk: Any) -> Any:
    """Move EVA's query and value biases into the bias of the fused `qkv` layer, in place.

    With separate biases, EVA's attention reads `qkv.weight` without calling the layer, which bypasses an adapter on it.
    """
    for module in trunk.modules():
        if getattr(module, "qkv", None) is not None and getattr(module, "q_bias", None) is not None:
            bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
            module.qkv.bias = nn.Parameter(bias.detach())
            module.q_bias = module.k_bias = module.v_bias = None
    return trunk


def timm_encoder(name: str, pretrained: str | None, timm_model_name: str) -> OpenCLIPTimmModel:
    """Return the OpenCLIP tower `name` with the timm trunk, with random weights if `pretrained` is None."""
    trunk = build_trunk(timm_model_name)
    height, width = trunk.patch_embed.img_size
    patch_height, patch_width = trunk.patch_embed.patch_size
    if height != width or patch_height != patch_width:
        raise UserError(f"{name!r}: its images or patches are not square; LLaVA classes need square ones")
    config = OpenCLIPTimmConfig(
        timm_model_name,
        image_size=height,
        patch_size=patch_height,
        hidden_size=trunk.embed_dim,
        num_hidden_layers=len(trunk.blocks),
        image_mean=list(trunk.pretrained_cfg["mean"]),
        image_std=list(trunk.pretrained_cfg["std"]),
    )
    model = OpenCLIPTimmModel(config)
    if pretrained is not None:
        source = pretrained_visual(name, pretrained)
        config.image_mean, config.image_std = list(source.image_mean), list(source.image_std)
        wanted = model.trunk.state_dict().keys()
        state = {k: v for k, v in join_biases(source.trunk).state_dict().items() if k in wanted}
        model.trunk.load_state_dict(state)
    return model.to(torch.float32)


AutoConfig.register(OpenCLIPTimmConfig.model_type, OpenCLIPTimmConfig)
AutoModel.register(OpenCLIPTimmConfig, OpenCLIPTimmModel)
