"""The ends of generation prompts in a text: what a model is trained on begins exactly where a prompt's tokens end.

A text is tokenized as a whole, and its tokens begin with those of each generation prompt in it. There are exceptions:

- The end of a prompt and the beginning of an answer merge into one token, such as two line breaks. Such a text is
  tokenized in two pieces: a mark of special tokens separates them, and is removed from the tokens.
- The processor appends something to every text, and so to a prompt: PaliGemma's appends a line break. It is inserted
  after each prompt in a conversation.
- The tokenizer appends a special token, such as the end-of-sequence token. It is removed from prompts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]
Encoded = dict[str, Tensor]
MARK_LENGTH = 3  # end-of-sequence tokens; a text has no three in a row


class PlainTokens(NamedTuple):
    """The tokens of a rendered text before media are expanded, and the characters of each."""

    ids: list[int]
    offsets: list[Span]


@dataclass(frozen=True)
class Inserted:
    """A text with pieces inserted at the ends of its generation prompts, and its tokens.

    `places` are the positions in the original text and the lengths of the pieces. `num_tokens` are the numbers of
    tokens up to the end of each prompt, by its position in the original text; None if the text's tokens differ.
    `marked`: marks are among the pieces. `merged`: some prompt's tokens differ, and marks would change the text.
    """

    text: str
    tokens: PlainTokens
    places: tuple[tuple[int, int], ...]
    num_tokens: dict[int, int | None]
    marked: bool = False
    merged: bool = False

    def moved(self, position: int) -> int:
        """Return where a position of the original text is; the end of a prompt moves after the inserted piece."""
        return position + sum(length for place, length in self.places if place <= position)


@dataclass(frozen=True)
class Prompts:
    """Tokenizes texts with generation prompts in them. `appended` is what the processor appends to every text."""

    tokenizer: Any
    appended: str = ""

    def plain(self, text: str) -> PlainTokens:
        """Tokenize a rendered text."""
        output = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=self.adds_bos(text))
        return PlainTokens(list(output["input_ids"]), output["offset_mapping"])

    def adds_bos(self, text: str) -> bool:
        """Return whether the tokenizer is to add special tokens: unless the template wrote the first one."""
        bos = self.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def insert(self, text: str, ends: Sequence[int]) -> Inserted:
        """Insert at the `ends` of the prompts in a text what is needed there, without changing the text."""
        inserted = self._inserted(text, ends, [self.appended] * len(ends))
        merged = [inserted.num_tokens[end] is None for end in ends]
        if not any(merged):
            return inserted
        if self.mark is not None:
            marked = self._inserted(text, ends, [self.appended + self.mark * flag for flag in merged])
            marks = self.marks(marked.tokens.ids).tolist()
            kept = [token for token, mark in zip(marked.tokens.ids, marks, strict=True) if not mark]
            same = self.tokenizer.decode(kept) == self.tokenizer.decode(inserted.tokens.ids)
            found = sum(marks) == MARK_LENGTH * sum(merged) and None not in marked.num_tokens.values()
            if same and found:
                return replace(marked, marked=True)
        return replace(inserted, merged=True)

    def _inserted(self, text: str, ends: Sequence[int], pieces: Sequence[str]) -> Inserted:
        places = tuple((end, len(piece)) for end, piece in zip(ends, pieces, strict=True))
        for end, piece in sorted(zip(ends, pieces, strict=True), reverse=True):
            text = text[:end] + piece + text[end:]
        tokens = self.plain(text)
        inserted = Inserted(text, tokens, places, {})
        # Text after such a token is tokenized independently of the text before it.
        independent = [
            i
            for i, (token, (start, stop)) in enumerate(zip(tokens.ids, tokens.offsets, strict=True))
            if token in self._separators and self._separators[token] in text[start:stop]
        ]
        for end in ends:
            at = bisect_right(independent, inserted.moved(end), key=lambda i: tokens.offsets[i][1])
            first = independent[at - 1] if at else 0
            inserted.num_tokens[end] = self._count(inserted, first, inserted.moved(end))
        return inserted

    def _count(self, inserted: Inserted, first: int, end: int) -> int | None:
        """Return the number of tokens of the first `end` characters. None if the tokens of the text differ from
        theirs. `first` is a token from which on the text is tokenized independently of what precedes it."""
        ids = inserted.tokens.ids
        piece = inserted.text[inserted.tokens.offsets[first][0] if first else 0 : end]
        if first:
            expected = list(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
        else:
            expected = self.plain(piece).ids
            expected = expected[: len(expected) - len(self.end)] if self.adds_bos(piece) else expected
        length = first + len(expected)
        return length if ids[first:length] == expected else None

    @property
    def mark(self) -> str | None:
        """The text that separates two pieces; None if the tokenizer has no end-of-sequence token."""
        eos = self.tokenizer.eos_token
        return eos and eos * MARK_LENGTH

    def marks(self, ids: list[int]) -> Tensor:
        """Return which of the tokens are marks, bool [tokens]."""
        eos, flags, run = self.tokenizer.eos_token_id, torch.zeros(len(ids), dtype=torch.bool), 0
        for i, token in enumerate(ids):
            run = run + 1 if token == eos else 0
            if run == MARK_LENGTH:
                flags[i + 1 - MARK_LENGTH : i + 1], run = True, 0
        return flags

    def without_marks(self, encoded: Encoded, turns: list[int]) -> tuple[Encoded, list[int]]:
        """Return an encoded text without its marks, and the values of `turns` [tokens] of the remaining tokens."""
        kept = ~self.marks(encoded["input_ids"][0].tolist())
        cut = {key: value[:, kept] if is_per_token(value, encoded) else value for key, value in encoded.items()}
        return cut, [turn for turn, keep in zip(turns, kept.tolist(), strict=True) if keep]

    def appended_after_mark(self, ids: list[int], adds_bos: bool) -> tuple[str, list[int]]:
        """Return the text and the special tokens that a processor appended, given its tokens of a text that ends with
        a mark."""
        marks = self.marks(ids).nonzero().flatten().tolist()
        tail = ids[marks[MARK_LENGTH - 1] + 1 :] if marks else []
        end = self.end if adds_bos else []
        tail = tail[: len(tail) - len(end)] if end and tail[-len(end) :] == end else tail
        length = next((i for i in range(len(tail), 0, -1) if tail[i - 1] not in self.tokenizer.all_special_ids), 0)
        return self.tokenizer.decode(tail[:length]), tail[length:]

    @cached_property
    def end(self) -> list[int]:
        """The special tokens that the tokenizer appends to a text, such as an end-of-sequence token."""
        ids, plain = (list(self.tokenizer("a", add_special_tokens=flag)["input_ids"]) for flag in (True, False))
        starts = range(len(ids) - len(plain) + 1)
        return next((ids[i + len(plain) :] for i in starts if ids[i : i + len(plain)] == plain), [])

    @cached_property
    def _separators(self) -> dict[int, str]:
        """The added tokens that split a text, with the text of each."""
        return {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items() if not token.normalized}


def without_end(encoded: Encoded, end: Sequence[int]) -> Encoded:
    """Return an encoded text without the tokens `end` at its end, if it has them."""
    ids = encoded["input_ids"][0].tolist()
    return shortened(encoded, len(ids) - len(end)) if end and ids[-len(end) :] == list(end) else encoded


def shortened(encoded: Encoded, length: int) -> Encoded:
    """Return an encoded text cut to its first tokens."""
    return {key: value[:, :length] if is_per_token(value, encoded) else value for key, value in encoded.items()}


def is_per_token(value: Tensor, encoded: Encoded) -> bool:
    """Return whether a tensor of an encoded text has a value per token: [1, tokens, ...]."""
    return value.shape[:2] == encoded["input_ids"].shape
