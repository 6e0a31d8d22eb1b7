"""The options of a multiple-choice question in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase as LETTERS

__all__ = ["LETTERS", "option_lines"]


def option_lines(options: Sequence[str]) -> str:
    """Return one line per option, "A. cat" then "B. dog", as in LLaVA-1.5's prompts; at most 26 options."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
