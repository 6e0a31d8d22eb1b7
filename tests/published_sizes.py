"""Published sizes of the models in the shipped configs, written out so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)


def clip() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def vicuna(billions: int) -> LlamaConfig:
    sizes: dict[str, Any] = {
        7: {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        13: {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    }[billions]
    return LlamaConfig(vocab_size=32064, **sizes)


QWEN_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SO400M: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}


def llava_onevision() -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(**SO400M, num_hidden_layers=26, image_size=384, patch_size=14, vision_use_head=False)
    return LlavaOnevisionConfig(vision_config=vision, text_config=Qwen2Config(**QWEN_7B, vocab_size=152000))


def qwen2_5_vl() -> Qwen2_5_VLConfig:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLConfig(vision_config=vision, text_config={**QWEN_7B, "vocab_size": 152064})


def qwen3_vl() -> Qwen3VLConfig:
    text = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    return Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": 4096})  # other values are the defaults


def smolvlm() -> SmolVLMConfig:
    text = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 49280,
        "pad_token_id": 2,
    }
    vision = {**SO400M, "num_hidden_layers": 27, "image_size": 384, "patch_size": 14}
    return SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=3)


def llama_7b() -> LlamaConfig:
    """The first LLaMA: Vicuna's sizes without its added tokens."""
    return LlamaConfig(**vicuna(7).to_dict() | {"vocab_size": 32000})


# Config and billions of parameters (from the model's page) by `model.path`.
PUBLISHED: dict[str, tuple[Callable[[], Any], float]] = {
    "llava-hf/llava-1.5-7b-hf": (lambda: LlavaConfig(vision_config=clip(), text_config=vicuna(7)), 7.06),
    "llava-hf/llava-1.5-13b-hf": (lambda: LlavaConfig(vision_config=clip(), text_config=vicuna(13)), 13.35),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (
        lambda: LlavaNextConfig(vision_config=clip(), text_config=vicuna(7)),
        7.06,
    ),
    "llava-hf/LLaVA-NeXT-Video-7B-hf": (
        lambda: LlavaNextVideoConfig(vision_config=clip(), text_config=vicuna(7)),
        7.06,
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (llava_onevision, 8.03),
    "Qwen/Qwen2.5-VL-7B-Instruct": (qwen2_5_vl, 8.29),
    "Qwen/Qwen3-VL-8B-Instruct": (qwen3_vl, 8.77),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (smolvlm, 2.25),
    "yahma/llama-7b-hf": (llama_7b, 6.74),
    # Vicuna and CLIP, composed and trained in two stages, have the size of LLaVA-1.5.
    "models/llava-1.5-7b_start": (lambda: LlavaConfig(vision_config=clip(), text_config=vicuna(7)), 7.06),
    "models/llava-1.5-7b_stage1": (lambda: LlavaConfig(vision_config=clip(), text_config=vicuna(7)), 7.06),
}
