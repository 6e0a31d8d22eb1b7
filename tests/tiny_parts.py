"""Building blocks of tiny models of many families: a tokenizer, a chat template, configs of text and vision."""

from __future__ import annotations

from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WIDTH = 32  # of the language model
SIDE, PATCH = 16, 4  # of an image, in pixels
SQUARE = {"height": SIDE, "width": SIDE}
PATCHES = (SIDE // PATCH) ** 2
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
ROLES = ("<|im_start|>", "<|im_end|>")


def template(image: str, video: str = "<video>") -> str:
    """Return a chat template that writes these placeholders."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{image}{{% elif part.type == 'video' %}}{video}"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokenizer(*plain: str, **named: str) -> hf.PreTrainedTokenizerFast:
    """Return a BPE tokenizer with merges, also of line breaks.

    `named` are special tokens by attribute, such as `image_token="<image>"`; `plain` are special tokens without one.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>", "<s>"]
    )
    core.train_from_iterator(["user\n", "assistant\n\n\n\n", "Frame1: ", "\n\nWhat is it?", "one of two\n\n"], trainer)
    built = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", **named
    )
    built.add_special_tokens({"additional_special_tokens": [*ROLES, *named.values(), *plain]})
    return built


def text(words: hf.PreTrainedTokenizerFast, model_type: str = "llama", **settings: Any) -> dict[str, Any]:
    common = {
        "model_type": model_type,
        "vocab_size": len(words) + 8,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    return common | settings


def vision(model_type: str = "clip_vision_model", **settings: Any) -> dict[str, Any]:
    common = {
        "model_type": model_type,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return common | settings
