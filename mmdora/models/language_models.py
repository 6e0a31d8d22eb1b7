"""Language models alone: which configs describe one, and their tokenizer behind a processor's interface."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)

PLAIN_TEMPLATE = "assets/alpaca.jinja"  # for tokenizers without a chat template


def is_language_model(config: Any) -> bool:
    """Return whether a model's config describes a causal language model alone.

    A model type that is both is an image-text-to-text model.
    """
    remote = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote:
        return False
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote


def auto_class(config: Any) -> Any:
    """Return the Auto class that loads a model with this config."""
    return AutoModelForCausalLM if is_language_model(config) else AutoModelForImageTextToText


def auto_names(config: Any) -> tuple[str, str]:
    """Return the names of the Auto classes that load a saved model with this config, and its processor."""
    return auto_class(config).__name__, "AutoTokenizer" if is_language_model(config) else "AutoProcessor"


def check_decoder(config: Any, name: str) -> None:
    """Raise UserError for a model that the Auto class accepts, but that does not predict the next token on its own."""
    kind = None
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        kind = "an encoder, whose tokens attend in both directions"
    if kind is not None:
        raise UserError(f"model.path: {name!r} is {kind} ({config.model_type}); use a decoder-only language model")


class TextProcessor:
    """A language model's tokenizer, with what the rest of mmdora uses of a processor. It accepts text only."""

    text_only = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **options: Any) -> TextProcessor:
        """Load the tokenizer of a model or a run.

        Raises UserError for a tokenizer without an end token, or without the character offsets of its tokens.
        """
        name = pretrained_model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if tokenizer.eos_token is None:
            raise UserError(f"{name}: its tokenizer has no eos_token, so answers could not end; set one in its files")
        if not tokenizer.is_fast:
            raise UserError(
                f"{name}: its tokenizer ({type(tokenizer).__name__}) is not a fast one and does not report which "
                "characters a token covers, so answers could not be located; convert it to a tokenizer.json"
            )
        return cls(tokenizer)

    def use_plain_template(self, name: str) -> None:
        """Give the tokenizer of the model `name`, which has no chat template, the plain prompt form."""
        self.chat_template = find_path(PLAIN_TEMPLATE).read_text(encoding="utf-8")
        log.warning(
            "%s has no chat template; prompts get the form of Alpaca (%s). model.chat_template sets another",
            name,
            PLAIN_TEMPLATE,
        )

    @property
    def chat_template(self) -> Any:
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.tokenizer.chat_template = template

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(conversation, **options)

    def __call__(self, text: list[str], **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer, which AutoTokenizer loads."""
        self.tokenizer.save_pretrained(folder)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of media preprocessing: none."""
        return {}
