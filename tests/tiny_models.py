"""Write tiny random language models and vision towers as Hugging Face directories, without network access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- 'USER: ' -}}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<image>\n' -}}
{%- elif part.type == 'video' -%}{{- '<video>\n' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- else -%}
{{- ' ASSISTANT: ' + message.content[0].text + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""
LAYERS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GEMMA = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "phi3": ("Phi3", {}),
    "gemma2": ("Gemma2", {**GEMMA, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", GEMMA),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def write_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE, **special: Any) -> None:
    """Write a byte-level tokenizer with `<s>` and `</s>`. Like many, it has no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["USER: what is it? ASSISTANT: a dog"], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", **special}
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def write_language_model(folder: Path, family: str, **changes: Any) -> Path:
    """Write a model of `LANGUAGE_MODELS` with its tokenizer; `changes` go into its config."""
    name, own = LANGUAGE_MODELS[family]
    config_class = transformers.Gemma3TextConfig if family == "gemma3" else getattr(transformers, f"{name}Config")
    torch.manual_seed(1)
    config = config_class(**{**LAYERS, **own, **changes})
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def write_tower(folder: Path, family: str, **changes: Any) -> Path:
    """Write a vision tower. `clip_whole` includes CLIP's text tower; dinov2's image processor crops to 16 px."""
    torch.manual_seed(2)
    vit = {**VIT, **changes}
    if family == "clip_whole":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.CLIPConfig(text_config={**text, "vocab_size": 50}, vision_config=vit, projection_dim=16)
        transformers.CLIPModel(config).save_pretrained(folder)
    elif family == "clip":
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vit)).save_pretrained(folder)
    elif family == "siglip":
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vit)).save_pretrained(folder)
    elif family == "dinov2":
        transformers.Dinov2Model(transformers.Dinov2Config(**vit)).save_pretrained(folder)
        size = {"height": 16, "width": 16}
        transformers.BitImageProcessor(crop_size=size, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    elif family == "dinov2_registers":
        config = transformers.Dinov2WithRegistersConfig(**vit)
        transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder


def _timm_entry(name: str, make: Any, vit: bool = True) -> str:
    """Register a tiny trunk with timm, as timm's own files do."""
    from timm.models import register_model

    def entry(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        kwargs = {k: v for k, v in kwargs.items() if k in ("num_classes", "global_pool")}
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4} if vit else {}
        trunk = make(**shape, **kwargs)
        trunk.pretrained_cfg = trunk.default_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        return trunk

    entry.__name__ = name
    register_model(entry)
    return name


def _timm_descriptions() -> dict[str, dict[str, Any]]:
    """Return OpenCLIP's model configs of tiny SigLIP, EVA and ConvNeXt towers."""
    from functools import partial

    from timm.models.convnext import ConvNeXt
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    siglip = _timm_entry("mmdora_tiny_siglip", partial(VisionTransformer, class_token=False))
    eva = _timm_entry("mmdora_tiny_eva", partial(Eva, qkv_bias=True, use_rot_pos_emb=True))
    # One stage is much longer than the others, as in every published ConvNeXt.
    stages = partial(ConvNeXt, depths=(2, 2, 5, 2), dims=(8, 8, 16, 32))
    convnext = _timm_entry("convnext_mmdora_tiny", stages, vit=False)
    size = {"image_size": 32, "timm_pool": "map", "timm_proj": "none"}
    return {
        "siglip": {"embed_dim": 32, "vision_cfg": {"timm_model_name": siglip, **size}},
        "eva": {"embed_dim": 32, "vision_cfg": {"timm_model_name": eva, **size, "timm_pool": "token"}},
        "convnext": {
            "embed_dim": 32,
            "vision_cfg": {"timm_model_name": convnext, "image_size": 128, "timm_pool": "", "timm_proj": "linear"},
        },
    }


TIMM = _timm_descriptions()
