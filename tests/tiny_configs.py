"""Tiny configs of any family: the defaults of its config class, with small sizes."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SMALL = {
    **dict.fromkeys(("hidden_size", "out_hidden_size", "text_hidden_size", "image_size", "intermediate_size"), 32),
    **dict.fromkeys(("ffn_dim", "moe_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_experts_per_tok", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("head_dim", "patch_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 1024,
}


def tiny_config(model_type: str, words: hf.PreTrainedTokenizerFast, **changes: Any) -> PreTrainedConfig:
    """Return a tiny config of a family. `changes` override single settings, in nested configs too."""
    special = {name: getattr(words, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    changes["text_config"] = {"vocab_size": len(words) + 8, **special, **changes.get("text_config", {})}
    return CONFIG_MAPPING[model_type](**_small(CONFIG_MAPPING[model_type](), changes))


def _small(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    settings = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            settings[key] = _small(value, changes.get(key, {})) | {"model_type": value.model_type}
        elif key in SMALL and isinstance(value, int):
            settings[key] = SMALL[key]
    return settings | {
        key: value for key, value in changes.items() if key not in settings or not isinstance(value, dict)
    }


def token_ids(words: hf.PreTrainedTokenizerFast, **names: str) -> dict[str, int]:
    """Return the ids of tokens, keyed as in a config."""
    return {key: words.convert_tokens_to_ids(token) for key, token in names.items()}
