"""Packed rows, several samples in one: what the model must be told so that none of them sees another.

transformers cuts its causal mask (or flash-attention's sequences) where `position_ids` start again, if it gets no
attention mask and no cache. Families that count positions along several axes get them for each sample by itself.
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

# Shown exact by tests/test_packing.py: loss and gradients of packed rows are those of the samples alone.
EXACT = (
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
LANGUAGE_MODELS = (
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
)
BOTH_WAYS = ("paligemma", "gemma3")


def check_packing(config: Any) -> None:
    """Raise UserError for a model, given its config, whose packed rows are not known to be exact."""
    family = config.model_type
    text = config.get_text_config()
    if family in BOTH_WAYS:
        reason = f"{family} attends in both directions over its pictures or its prompt, and packed rows would mix them"
    elif family not in EXACT or text.model_type not in LANGUAGE_MODELS:
        unknown = text.model_type if family in EXACT else family
        reason = f"{unknown} has not been shown to keep the samples of a row apart"
    else:
        return
    raise UserError(f"data.packing: {reason}; set data.packing=false")


def row_length(model: Any, data: DataConfig) -> int | None:
    """Tokens of a packed row; None without packing. Flash-attention cuts one row alone, which takes all samples."""
    if not data.packing:
        return None
    attention = model.config.get_text_config()._attn_implementation or ""
    return sys.maxsize if attention.startswith("flash") else data.max_length


def packed_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A packed batch of the collator's, as the model takes it."""
    positions = batch["position_ids"]
    if hasattr(model.base_model, "get_rope_index"):
        positions = torch.cat([positions[None], rotary_positions(model.base_model, batch)])
    return batch | {"position_ids": positions, "use_cache": False}  # a cache would switch the cut masks off


def rotary_positions(base: Any, batch: dict[str, Any]) -> Tensor:
    """Positions [axes, rows, tokens] of each sample, counted by the model as if it stood alone."""
    starts = (batch["position_ids"] == 0).flatten().nonzero().flatten()
    sizes = torch.diff(starts, append=starts.new_tensor([batch["position_ids"].numel()])).tolist()
    per_token = [key for key in ("input_ids", "mm_token_type_ids") if key in batch]
    alone: dict[str, Tensor] = {key: _unpacked(batch[key], sizes) for key in per_token}
    alone["attention_mask"] = _unpacked(torch.ones_like(batch["input_ids"]), sizes)
    wanted = inspect.signature(base.get_rope_index).parameters
    media = {key: value for key, value in batch.items() if key in wanted and key not in alone}
    positions, _ = base.get_rope_index(**alone, **media)
    packed = torch.cat([positions[:, place, :size] for place, size in enumerate(sizes)], dim=1)
    return packed.reshape(len(packed), *batch["position_ids"].shape)


def _unpacked(packed: Tensor, sizes: list[int]) -> Tensor:
    """[rows, tokens] → [samples, longest], padded with zeros."""
    return pad_sequence(list(packed.flatten().split(sizes)), batch_first=True)
