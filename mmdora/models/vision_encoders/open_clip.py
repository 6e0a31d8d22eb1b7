"""The vision encoder `open_clip`: OpenCLIP image towers as Hugging Face models, with attention that adapters can reach.

The tower is open_clip's `VisionTransformer` (without the contrastive projection) inside a small `PreTrainedModel`, so
it can be saved, reloaded and used in any stock LLaVA class. `to_clip` converts it to a `CLIPVisionModel`, which
transformers loads without mmdora. timm and ConvNeXt trunks are in the files beside this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmdora.core.errors import UserError
from mmdora.models.attention import explicit_attention, explicit_state_dict
from mmdora.models.vision_encoders.open_clip_convnext import OpenCLIPConvNextModel, convnext_encoder
from mmdora.models.vision_encoders.open_clip_timm import OpenCLIPTimmModel, timm_encoder
from mmdora.models.vision_encoders.open_clip_weights import pretrained_visual
from mmdora.models.vision_encoders.registry import VISION_ENCODERS

if TYPE_CHECKING:
    from transformers import CLIPVisionModel


class OpenCLIPVisionConfig(PretrainedConfig):
    """`vision_cfg` is open_clip's description of the tower; LLaVA classes read the other fields."""

    model_type = "open_clip_vision"

    def __init__(
        self,
        vision_cfg: dict[str, Any] | None = None,
        embed_dim: int = 512,
        quick_gelu: bool = False,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ):
        cfg = {
            "width": 768,
            "layers": 12,
            "head_width": 64,
            "mlp_ratio": 4.0,
            "patch_size": 16,
            "image_size": 224,
        }
        cfg |= vision_cfg or {}
        self.vision_cfg = cfg
        self.embed_dim = embed_dim
        self.quick_gelu = quick_gelu
        self.image_mean = image_mean
        self.image_std = image_std
        self.hidden_size = cfg["width"]
        self.num_hidden_layers = cfg["layers"]
        self.num_attention_heads = cfg["width"] // cfg["head_width"]
        self.intermediate_size = int(cfg["width"] * cfg["mlp_ratio"])
        self.patch_size = cfg["patch_size"]
        self.image_size = cfg["image_size"]
        for derived in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            kwargs.pop(derived, None)
        kwargs.pop("patch_size", None)
        kwargs.pop("image_size", None)
        super().__init__(**kwargs)


class OpenCLIPVisionModel(PreTrainedModel):
    """Map pixel_values [batch, 3, image_size, image_size] to hidden states [batch, 1 + patches, hidden_size].

    The class token is first.
    """

    config_class = OpenCLIPVisionConfig
    base_model_prefix = "open_clip_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("ResidualAttentionBlock",)

    def __init__(self, config: OpenCLIPVisionConfig):
        super().__init__(config)
        from open_clip.model import _build_vision_tower

        self.visual = _build_vision_tower(config.embed_dim, dict(config.vision_cfg), config.quick_gelu)
        self.visual.proj = None  # the contrastive head, which no vision-language model reads
        explicit_attention(self.visual)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: open_clip's constructor initialises the tower, and from_pretrained must not overwrite that."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return all hidden states, which LLaVA classes index: the embeddings and the output of each block."""
        x = self.visual._embeds(pixel_values.to(self.visual.conv1.weight.dtype))
        hidden_states = [x]
        for block in self.visual.transformer.resblocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            hidden_states.append(x)
        pooled = self.visual.ln_post(x[:, 0])
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled, hidden_states=tuple(hidden_states))

    def get_input_embeddings(self) -> nn.Module:
        return self.visual.conv1

    def to_clip(self) -> CLIPVisionModel:
        """Return the equivalent CLIP vision model of transformers. Raises UserError if CLIP lacks a layer of it."""
        from transformers import CLIPVisionConfig, CLIPVisionModel

        cfg = self.config
        if not isinstance(self.visual.ln_pre, nn.LayerNorm) or cfg.vision_cfg.get("ls_init_value"):
            raise UserError(
                "this OpenCLIP tower (no ln_pre, or LayerScale) has no equivalent in transformers' CLIPVisionModel"
            )
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=cfg.hidden_size,
                intermediate_size=cfg.intermediate_size,
                num_hidden_layers=cfg.num_hidden_layers,
                num_attention_heads=cfg.num_attention_heads,
                image_size=cfg.image_size,
                patch_size=cfg.patch_size,
                hidden_act="quick_gelu" if cfg.quick_gelu else "gelu",
                projection_dim=cfg.embed_dim,
            )
        )
        # Some releases of transformers wrap the tower in `vision_model.`; the names inside are the same.
        prefix = "vision_model." if any(k.startswith("vision_model.") for k in clip.state_dict()) else ""
        state = {prefix + _clip_key(key): tensor for key, tensor in self.visual.state_dict().items()}
        clip.load_state_dict(state)
        return clip.to(self.dtype).train(self.training)


_CLIP_NAMES = [
    ("transformer.resblocks.", "encoder.layers."),
    ("ln_pre", "pre_layrnorm"),
    ("ln_post", "post_layernorm"),
    ("conv1", "embeddings.patch_embedding"),
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    (".attn.", ".self_attn."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
]


def _clip_key(key: str) -> str:
    for open_clip_name, clip_name in _CLIP_NAMES:
        key = key.replace(open_clip_name, clip_name)
    return key


@VISION_ENCODERS.register("open_clip")
def open_clip_encoder(
    name: str, pretrained: str | None = None, model_config: dict[str, Any] | None = None
) -> OpenCLIPVisionModel | OpenCLIPTimmModel | OpenCLIPConvNextModel:
    """Return an OpenCLIP tower that adapters can reach.

    `name` is an architecture, `pretrained` a tag or a file (None: random weights). `model_config` describes an
    architecture that open_clip does not ship, in the form of its `model_configs/*.json`; `name` is then only a label.
    Raises UserError for towers whose features are not a sequence of patches.
    """
    import open_clip

    cfg = model_config or open_clip.get_model_config(name)
    if cfg is None:
        raise UserError(
            f"open_clip has no architecture {name!r}; `open_clip.list_models()` lists them, e.g. ViT-L-14-336"
        )
    vision_cfg = cfg["vision_cfg"]
    if str(vision_cfg.get("timm_model_name", "")).startswith("convnext"):
        return convnext_encoder(name, pretrained, vision_cfg)
    if vision_cfg.get("timm_model_name"):
        return timm_encoder(name, pretrained, vision_cfg["timm_model_name"])
    if isinstance(vision_cfg.get("layers"), list):
        raise UserError(
            f"{name!r} is a ResNet: its stages differ in width and resolution, but LLaVA classes need one sequence of "
            "patches per layer; use a ViT, SigLIP, EVA or ConvNeXt tower"
        )
    # CoCa's pooler comes after the blocks, and no vision-language model reads it.
    vision_cfg = {k: v for k, v in vision_cfg.items() if not k.startswith("attn_pooler") and k != "attentional_pool"}
    config = OpenCLIPVisionConfig(vision_cfg, cfg["embed_dim"], bool(cfg.get("quick_gelu", False)))
    if pretrained is None:
        return OpenCLIPVisionModel(config)
    source = pretrained_visual(name, pretrained)
    config.image_mean, config.image_std = list(source.image_mean), list(source.image_std)
    config.quick_gelu = any(type(m).__name__ == "QuickGELU" for m in source.modules())
    model = OpenCLIPVisionModel(config)
    state = {k: v for k, v in source.state_dict().items() if k != "proj"}
    if cfg["vision_cfg"].get("attentional_pool"):
        own = model.visual.ln_post.state_dict(prefix="ln_post.")
        state = {k: v for k, v in state.items() if not k.startswith(("attn_pool", "ln_post"))} | own
    model.visual.load_state_dict(explicit_state_dict(state))
    return model.to(torch.float32)


AutoConfig.register(OpenCLIPVisionConfig.model_type, OpenCLIPVisionConfig)
AutoModel.register(OpenCLIPVisionConfig, OpenCLIPVisionModel)
