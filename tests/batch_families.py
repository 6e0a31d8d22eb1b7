"""Tiny models of families whose tensors form batches in unusual ways, with real processors."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.families import Built, Family
from tests.tiny_configs import tiny_config, token_ids
from tests.tiny_parts import template, tokenizer

SQUARE = {"height": 32, "width": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def mllama() -> Built:
    """`cross_attention_mask` [1, tokens, images, tiles], and pixels [1, images, tiles, ...] for every sample."""
    words = tokenizer("<|python_tag|>", image_token="<|image|>")
    config = tiny_config(
        "mllama",
        words,
        **token_ids(words, image_token_index="<|image|>"),
        text_config={"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        vision_config={
            "vision_output_dim": 64,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 4,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            "attention_heads": 4,
        },
    )
    images = hf.MllamaImageProcessor(size=SQUARE, max_image_tiles=4)
    return hf.MllamaForConditionalGeneration(config), hf.MllamaProcessor(images, words, template("<|image|>"))


def idefics() -> Built:
    """`image_attention_mask` [1, tokens, images]."""
    words = tokenizer("<fake_token_around_image>", image_token="<image>")
    special = {name: getattr(words, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = hf.IdeficsConfig(
        vocab_size=len(words),
        additional_vocab_size=0,
        **special,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        cross_layer_interval=1,
        vision_config={
            "embed_dim": 32,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        perceiver_config={"use_resampler": False},
        freeze_text_layers=False,
        freeze_vision_layers=False,
    )
    span = "<fake_token_around_image><image><fake_token_around_image>"
    processor = hf.IdeficsProcessor(hf.IdeficsImageProcessor(image_size=32), words)
    processor.chat_template = template(span)
    return hf.IdeficsForVisionText2Text(config), processor


def minicpm() -> Built:
    """`pixel_values` [1, 3, patch, patches * patch]: one strip of all images."""
    spans = {"image_start": "<image>", "image_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>"}
    numbers = {"image_id_start": "<image_id>", "image_id_end": "</image_id>"}
    tokens = {f"{name}_token": token for name, token in (spans | numbers).items()}
    words = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>", **tokens)
    config = tiny_config(
        "minicpmv4_6",
        words,
        insert_layer_id=0,
        **token_ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
        text_config={
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": ROPE | {"partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]},
            "linear_conv_kernel_dim": 2,
        },
        vision_config={"insert_layer_id": 0, "image_size": 64, "num_hidden_layers": 3},
    )
    pixels = {"max_slice_nums": 2, "scale_resolution": 64, "patch_size": 8}
    images, videos = hf.MiniCPMV4_6ImageProcessor(**pixels), hf.MiniCPMV4_6VideoProcessor(**pixels)
    processor = hf.MiniCPMV4_6Processor(image_processor=images, video_processor=videos, tokenizer=words)
    processor.chat_template = template("<|image_pad|>", "<|video_pad|>")
    return hf.MiniCPMV4_6ForConditionalGeneration(config), processor


def molmo2() -> Built:
    """`image_token_pooling` holds indices into the patches of all images."""
    parts = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>"]
    words = tokenizer(*parts, "<im_low>", image_token="<|image|>", video_token="<|video|>")
    ids = token_ids(
        words,
        image_start_token_id="<im_start>",
        low_res_image_start_token_id="<low_res_im_start>",
        image_end_token_id="<im_end>",
        image_patch_id="<im_patch>",
        frame_start_token_id="<frame_start>",
        frame_end_token_id="<frame_end>",
        image_low_res_id="<im_low>",
        image_col_id="<im_col>",
    )
    config = tiny_config(
        "molmo2",
        words,
        **ids,
        text_config={"additional_vocab_size": 16},
        vision_config={"image_size": [32, 32], "num_key_value_heads": 4},
        adapter_config={"vision_feature_layer": [-1, -2], "num_key_value_heads": 4},
    )
    crops = {"size": SQUARE, "patch_size": 8, "pooling_size": [2, 2]}
    images = hf.Molmo2ImageProcessor(**crops, max_crops=2, overlap_margins=[1, 1])
    processor = hf.Molmo2Processor(images, hf.Molmo2VideoProcessor(**crops), words)
    processor.chat_template = template("<|image|>", "<|video|>")
    return hf.Molmo2ForConditionalGeneration(config), processor


def perception_lm() -> Built:
    """`pixel_values` [1, tiles, ...] with any number of tiles, which are not padded."""
    words = tokenizer(image_token="<|image|>", video_token="<|video|>")
    tower = {
        "embed_dim": 64,
        "img_size": (32, 32),
        "depth": 2,
        "num_heads": 4,
        "global_pool": "",
        "patch_size": 8,
        "use_post_transformer_norm": False,
        "init_values": 0.1,
        "ref_feat_shape": (4, 4),
    }
    config = tiny_config(
        "perception_lm",
        words,
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        **token_ids(words, image_token_id="<|image|>", video_token_id="<|video|>"),
        vision_config={"architecture": "vit_pe_core_large_patch14_336", "model_args": tower},
    )
    processor = hf.PerceptionLMProcessor(
        hf.PerceptionLMVideoProcessor(size=SQUARE),
        hf.PerceptionLMImageProcessor(tile_size=32, max_num_tiles=4, vision_input_type="thumb+tile"),
        words,
        patch_size=8,
        pooling_ratio=2,
    )
    processor.chat_template = template("<|image|>", "<|video|>")
    return hf.PerceptionLMForConditionalGeneration(config), processor


def ernie() -> Built:
    """`moe_mm_token_type_ids` [1, tokens], one of many names of token types."""
    kinds = {"image": "IMAGE", "video": "VIDEO"}
    tokens = {f"{kind}_token": f"<|{name}_PLACEHOLDER|>" for kind, name in kinds.items()}
    tokens |= {f"{kind}_{end}_token": f"<|{n}_{end.upper()}|>" for kind, n in kinds.items() for end in ("start", "end")}
    words = tokenizer(**tokens)
    config = tiny_config(
        "ernie4_5_vl_moe",
        words,
        **token_ids(words, **{f"{name}_id": token for name, token in tokens.items()}),
        text_config={
            "moe_intermediate_size": [16, 8],
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
        },
    )
    pixels = {"size": {"shortest_edge": 256, "longest_edge": 2048}, "patch_size": 8}
    processor = hf.Ernie4_5_VLMoeProcessor(
        hf.Ernie4_5_VLMoeImageProcessor(**pixels),
        words,
        hf.Ernie4_5_VLMoeVideoProcessor(**pixels, draw_on_frames=False),
    )
    processor.chat_template = template(
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
    )
    return hf.Ernie4_5_VLMoeForConditionalGeneration(config), processor


BATCH_FAMILIES = {
    "mllama": Family(mllama, ("image", "two images", "text")),
    "idefics": Family(idefics, ("image", "two images", "text")),
    "minicpm": Family(minicpm),
    "molmo2": Family(molmo2, ("image", "two images", "text")),  # the model rejects images and videos in one batch
    "perception_lm": Family(perception_lm, ("image", "video", "text")),  # its processor rejects images of two shapes
    "ernie": Family(ernie),
}


def build_sensitive(family: Family) -> tuple[Any, Any]:
    """Build a model whose answers depend on every input: large weights, and no parameters of zero, such as gates."""
    torch.manual_seed(0)
    model, processor = family.build()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and not any(part in name for part in ("vision", "visual", "image")):
            nn.init.normal_(weight, std=0.15)
        elif weight.dim() <= 1 and not weight.any():
            nn.init.normal_(weight, std=0.5)
    return model.eval(), processor
