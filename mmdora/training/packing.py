"""Packed rows: several samples in one row, none of which attends to another.

transformers splits its causal mask (or flash-attention's sequences) where `position_ids` restart, if it gets no
attention mask and no cache. Model families with positions along several axes get them computed per sample.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdora.core.config import DataConfig
from mmdora.core.errors import UserError

# tests/test_packing.py and tests/test_language_models.py show for these that loss and gradients of packed rows equal
# those of the single samples.
SUPPORTED_FAMILIES = (
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "llava_resampler",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "idefics3",
    "smolvlm",
    "internvl",
)
SUPPORTED_LANGUAGE_MODELS = (
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "gemma2",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "codegen",
    "cohere",
    "cohere2",
    "gemma",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "granite",
    "mixtral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "persimmon",
    "phi",
    "qwen2_moe",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
BIDIRECTIONAL = ("paligemma", "gemma3")


def check_packing(config: Any) -> None:
    """Raise UserError if packed rows are not known to be exact for a model with this config."""
    family = config.model_type
    text = config.get_text_config()
    alone = text is config  # a language model alone
    if family in BIDIRECTIONAL:
        reason = f"{family} attends in both directions over images or prompt, so packed rows would mix samples"
    elif not (alone or family in SUPPORTED_FAMILIES) or text.model_type not in SUPPORTED_LANGUAGE_MODELS:
        unknown = text.model_type if family in SUPPORTED_FAMILIES else family
        reason = f"{unknown} has not been tested with packed rows"
    else:
        return
    raise UserError(f"data.packing: {reason}; set data.packing=false")


def row_length(model: Any, data: DataConfig) -> int | None:
    """Return the length of a packed row in tokens, or None without packing.

    flash-attention splits a single row only, so that row takes all samples.
    """
    if not data.packing:
        return None
    attention = model.config.get_text_config()._attn_implementation or ""
    return sys.maxsize if attention.startswith("flash") else data.max_length


def packed_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the model's inputs for a packed batch of the collator."""
    positions = batch["position_ids"]
    if hasattr(model.base_model, "get_rope_index"):
        positions = torch.cat([positions[None], rotary_positions(model.base_model, batch)])
    return batch | {"position_ids": positions, "use_cache": False}  # with a cache the mask would not be split


def rotary_positions(base: Any, batch: dict[str, Any]) -> Tensor:
    """Return positions [axes, rows, tokens], which the model computes for each sample on its own."""
    starts = (batch["position_ids"] == 0).flatten().nonzero().flatten()
    sizes = torch.diff(starts, append=starts.new_tensor([batch["position_ids"].numel()])).tolist()
    per_token = [key for key in ("input_ids", "mm_token_type_ids") if key in batch]
    unpacked: dict[str, Tensor] = {key: _unpacked(batch[key], sizes) for key in per_token}
    unpacked["attention_mask"] = _unpacked(torch.ones_like(batch["input_ids"]), sizes)
    accepted = inspect.signature(base.get_rope_index).parameters
    media = {key: value for key, value in batch.items() if key in accepted and key not in unpacked}
    positions, _ = base.get_rope_index(**unpacked, **media)
    packed = torch.cat([positions[:, place, :size] for place, size in enumerate(sizes)], dim=1)
    return packed.reshape(len(packed), *batch["position_ids"].shape)


def _unpacked(packed: Tensor, sizes: list[int]) -> Tensor:
    """Turn [rows, tokens] into [samples, longest sample], padded with zeros."""
    return pad_sequence(list(packed.flatten().split(sizes)), batch_first=True)
