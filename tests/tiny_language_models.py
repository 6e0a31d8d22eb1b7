"""Tiny random causal language models of many families, by the `model_type` of their configs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Dropout would make two forward passes differ.
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
GROUPED = {"num_key_value_heads": 2}
GPT2 = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
GEMMA = {"head_dim": 8, **GROUPED}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "cohere": GROUPED,
    "cohere2": {**GROUPED, "sliding_window": 16},
    "codegen": {**GPT2, **NO_DROPOUT, "rotary_dim": 8},
    "falcon": {"new_decoder_architecture": False},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "glm4": {**GEMMA},
    "gpt2": {**GPT2, **NO_DROPOUT},
    "gpt_bigcode": {**GPT2, **NO_DROPOUT},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 16},
    "gpt_neox": {},
    "gptj": {**GPT2, **NO_DROPOUT, "rotary_dim": 8},
    "granite": GROUPED,
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 16},
    "mixtral": {**GROUPED, **MOE},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "nemotron": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "sliding_window": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "persimmon": {},
    "phi": {"embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "phi3": GROUPED,
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen2_moe": {**GROUPED, **MOE, "shared_expert_intermediate_size": 24},
    "qwen3": GEMMA,
    "qwen3_moe": {**GEMMA, **MOE},
    "seed_oss": GEMMA,
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": {**GROUPED, "embedding_dropout": 0.0, "residual_dropout": 0.0},
}


def build(family: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny random model in evaluation mode. Its head is not zero, and not tied unless the family ties it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    nn.init.normal_(model.get_output_embeddings().weight, std=0.2)
    return model
