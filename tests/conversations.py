"""Short conversations and the shipped processor, for tests that need no model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from data_pipelines.samples import Message, Text
from mmdora.core.config import ModelConfig
from mmdora.models.loading import load_shape


def user(*parts) -> Message:
    """Return a user turn; strings become text parts."""
    return Message("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def assistant(text: str, train: bool = True) -> Message:
    """Return an assistant turn."""
    return Message("assistant", (Text(text),), train)


def tiny_processor() -> Any:
    """Return a copy of the shipped model's processor, whose chat template a test may change."""
    return copy.copy(_loaded_processor())


@cache
def _loaded_processor() -> Any:
    return load_shape(ModelConfig(path="assets/tiny-llava"))[1]
