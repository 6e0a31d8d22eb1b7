"""A tiny random model and a real processor for each family in ARCHITECTURES, built offline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as hf
from torch import nn

from mmdora.models.llava_resampler import (
    LlavaResamplerConfig,
    LlavaResamplerForConditionalGeneration,
    LlavaResamplerProcessor,
)
from tests.tiny_parts import PATCH, PATCHES, PINPOINTS, SIDE, SQUARE, WIDTH, template, text, tokenizer, vision

Built = tuple[Any, Any]


@dataclass(frozen=True)
class Family:
    build: Callable[[], Built]
    media: tuple[str, ...] = ("image", "two images", "video", "text")  # kinds of samples that its processor supports


def _llava_words() -> hf.PreTrainedTokenizerFast:
    return tokenizer(image_token="<image>", video_token="<video>")


def _llava_settings(words: hf.PreTrainedTokenizerFast, **settings: Any) -> dict[str, Any]:
    return {
        "text_config": text(words),
        "vision_config": vision(),
        "image_token_index": words.convert_tokens_to_ids("<image>"),
        "video_token_index": words.convert_tokens_to_ids("<video>"),
    } | settings


LLAVA_PROCESSOR = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "chat_template": template("<image>\n", "<video>\n"),
}
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}


def llava() -> Built:
    words = _llava_words()
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**_llava_settings(words)))
    return model, hf.LlavaProcessor(hf.CLIPImageProcessor(**CROPPED), words, **LLAVA_PROCESSOR)


def llava_next() -> Built:
    words = _llava_words()
    model = hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(**_llava_settings(words, image_grid_pinpoints=PINPOINTS))
    )
    images = hf.LlavaNextImageProcessor(**CROPPED, image_grid_pinpoints=PINPOINTS)
    return model, hf.LlavaNextProcessor(images, words, **LLAVA_PROCESSOR)


def llava_next_video() -> Built:
    words = _llava_words()
    model = hf.LlavaNextVideoForConditionalGeneration(
        hf.LlavaNextVideoConfig(**_llava_settings(words, image_grid_pinpoints=PINPOINTS))
    )
    return model, hf.LlavaNextVideoProcessor(
        video_processor=hf.LlavaNextVideoVideoProcessor(**CROPPED),
        image_processor=hf.LlavaNextImageProcessor(**CROPPED, image_grid_pinpoints=PINPOINTS),
        tokenizer=words,
        **LLAVA_PROCESSOR,
    )


def llava_onevision() -> Built:
    words = _llava_words()
    settings = _llava_settings(
        words,
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = hf.LlavaOnevisionForConditionalGeneration(hf.LlavaOnevisionConfig(**settings))
    return model, hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer=words,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n", "<video>\n"),
    )


def llava_resampler() -> Built:
    words = _llava_words()
    config = LlavaResamplerConfig(**_llava_settings(words, image_seq_length=3))
    return LlavaResamplerForConditionalGeneration(config), LlavaResamplerProcessor(
        hf.SiglipImageProcessor(size=SQUARE),
        words,
        hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=3,
        chat_template=template("<image>\n", "<video>\n"),
    )


def video_llava() -> Built:
    words = _llava_words()
    model = hf.VideoLlavaForConditionalGeneration(hf.VideoLlavaConfig(**_llava_settings(words)))
    return model, hf.VideoLlavaProcessor(
        image_processor=hf.VideoLlavaImageProcessor(**CROPPED),
        video_processor=hf.VideoLlavaVideoProcessor(**CROPPED),
        tokenizer=words,
        **LLAVA_PROCESSOR,
    )


QWEN_PIXELS = {"size": {"shortest_edge": 64, "longest_edge": 512}, "patch_size": PATCH}


def _qwen_words() -> hf.PreTrainedTokenizerFast:
    return tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )


def _qwen_settings(words: hf.PreTrainedTokenizerFast, text_config: dict, vision_config: dict) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    tower = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "intermediate_size": 40, "out_hidden_size": WIDTH}
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    return {
        "text_config": text_config | {"rope_parameters": rope},
        "vision_config": tower | vision_config,
        **{f"{name}_id": words.convert_tokens_to_ids(getattr(words, name)) for name in names},
    }


def _qwen_processor(processor: type, videos: type, words: hf.PreTrainedTokenizerFast) -> Any:
    span = "<|vision_start|>{}<|vision_end|>"
    placeholders = (span.format(token) for token in ("<|image_pad|>", "<|video_pad|>"))
    return processor(
        image_processor=hf.Qwen2VLImageProcessor(**QWEN_PIXELS),
        tokenizer=words,
        video_processor=videos(**QWEN_PIXELS),
        chat_template=template(*placeholders),
    )


def qwen2_vl() -> Built:
    words = _qwen_words()
    tower = {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2}
    settings = _qwen_settings(words, text(words, "qwen2_vl_text"), tower)
    del settings["vision_config"]["intermediate_size"], settings["vision_config"]["out_hidden_size"]
    model = hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(**settings))
    return model, _qwen_processor(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor, words)


def qwen2_5_vl() -> Built:
    words = _qwen_words()
    tower = {"hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    settings = _qwen_settings(words, text(words, "qwen2_5_vl_text"), tower)
    model = hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(**settings))
    return model, _qwen_processor(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor, words)


QWEN3_TOWER = {"hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}


def qwen3_vl() -> Built:
    words = _qwen_words()
    settings = _qwen_settings(words, text(words, "qwen3_vl_text", head_dim=8), QWEN3_TOWER)
    model = hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(**settings))
    return model, _qwen_processor(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, words)


def qwen3_vl_moe() -> Built:
    words = _qwen_words()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    settings = _qwen_settings(words, text(words, "qwen3_vl_moe_text", **experts), QWEN3_TOWER)
    model = hf.Qwen3VLMoeForConditionalGeneration(hf.Qwen3VLMoeConfig(**settings))
    return model, _qwen_processor(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor, words)


def _idefics(config: type, model: type, **settings: Any) -> tuple[Any, hf.PreTrainedTokenizerFast]:
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    words = tokenizer(
        "<video>",
        *cells,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    tower = vision(settings["vision"])
    built = model(
        config(
            text_config=text(words),
            vision_config=tower,
            image_token_id=words.convert_tokens_to_ids("<image>"),
            scale_factor=2,
        )
    )
    return built, words


SPLIT = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def idefics3() -> Built:
    model, words = _idefics(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, vision="idefics3_vision")
    images = hf.Idefics3ImageProcessor(**SPLIT)
    return model, hf.Idefics3Processor(images, words, image_seq_len=PATCHES // 4, chat_template=template("<image>"))


def smolvlm() -> Built:
    model, words = _idefics(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, vision="smolvlm_vision")
    return model, hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**SPLIT),
        words,
        hf.SmolVLMVideoProcessor(**SPLIT),
        image_seq_len=PATCHES // 4,
        chat_template=template("<image>"),
    )


def internvl() -> Built:
    words = tokenizer(
        context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>", video_token="<video>"
    )
    config = hf.InternVLConfig(
        text_config=text(words, "qwen2"),
        vision_config=vision("internvl_vision"),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=PATCHES // 4,
    )
    return hf.InternVLForConditionalGeneration(config), hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=2),
        words,
        hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=PATCHES // 4,
        chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
    )


def paligemma() -> Built:
    words = tokenizer(image_token="<image>")
    images = hf.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = PATCHES
    processor = hf.PaliGemmaProcessor(images, words, chat_template=template("<image>"))
    config = hf.PaliGemmaConfig(
        text_config=text(words, "gemma", head_dim=8),
        vision_config=vision("siglip_vision_model", vision_use_head=False, projection_dim=WIDTH),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def gemma3() -> Built:
    words = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    names = ("boi_token", "eoi_token", "image_token")
    ids = {f"{name}_index": words.convert_tokens_to_ids(getattr(words, name)) for name in names}
    config = hf.Gemma3Config(
        text_config=text(words, "gemma3_text", head_dim=8, sliding_window=512),
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        **ids,
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    # It is initialised with zeros, which gives the vision encoder no gradient.
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=SQUARE), words, image_seq_length=4, chat_template=template("<start_of_image>")
    )


NO_VIDEO = ("image", "two images", "text")
FAMILIES = {
    "llava": Family(llava, NO_VIDEO),
    "llava_next": Family(llava_next, NO_VIDEO),
    "llava_next_video": Family(llava_next_video),
    "llava_onevision": Family(llava_onevision),
    "llava_resampler": Family(llava_resampler),
    "video_llava": Family(video_llava),
    "qwen2_vl": Family(qwen2_vl),
    "qwen2_5_vl": Family(qwen2_5_vl),
    "qwen3_vl": Family(qwen3_vl),
    "qwen3_vl_moe": Family(qwen3_vl_moe),
    "idefics3": Family(idefics3, NO_VIDEO),
    "smolvlm": Family(smolvlm),
    "internvl": Family(internvl),
    "paligemma": Family(paligemma, ("image", "two images")),  # its processor needs an image
    "gemma3": Family(gemma3, NO_VIDEO),
}
