"""Options of a multiple-choice question, as they stand in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase as LETTERS

__all__ = ["LETTERS", "option_lines"]


def option_lines(options: Sequence[str]) -> str:
    """One option a line, "A. cat" and then "B. dog", as LLaVA-1.5 shows them; at most 26."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
