"""Encoded samples as one batch: token sequences padded or packed, media tensors joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipelines.encoding import IGNORED, PER_TOKEN, Encoded


@dataclass(frozen=True)
class Collator:
    """Rows in, one batch out: `input_ids`, `labels`, `attention_mask` [rows, longest] and media tensors.

    `fillers` are rows that a batch without such media gets, by the key of the pixels that they bring (see
    Encoder.filler). With `pack`, samples stand behind one another in rows of at most so many tokens: `position_ids`
    start again at each, and there is no `attention_mask`, whose place they take (see mmdora.training.packing).
    """

    pad_token_id: int
    side: Literal["left", "right"] = "right"
    fillers: dict[str, Encoded] = field(default_factory=dict)
    pack: int | None = None  # tokens

    def __call__(self, rows: Sequence[Encoded]) -> Encoded:
        rows = list(rows)
        rows += [filler for key, filler in self.fillers.items() if not any(key in row for row in rows)]
        if self.pack is not None:
            lengths = [row["input_ids"].shape[1] for row in rows]
            rows = [pack([rows[place] for place in places]) for places in first_fit(lengths, self.pack)]
        length = max(row["input_ids"].shape[1] for row in rows)
        batch = {}
        for key in sorted({key for row in rows for key in row}):
            tensors = [row[key] for row in rows if key in row]
            if key == "position_ids":
                # Positions of padding start again too: to the model it is one more sample.
                batch[key] = torch.cat([torch.cat([t, torch.arange(length - t.shape[1])[None]], 1) for t in tensors])
            elif key in PER_TOKEN:
                value = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(key, 0)
                batch[key] = torch.cat([self._pad(t, length, value) for t in tensors])
            else:
                batch[key] = join(tensors)
        return batch

    def _pad(self, tensor: Tensor, length: int, value: int) -> Tensor:
        missing = length - tensor.shape[1]
        return F.pad(tensor, (missing, 0) if self.side == "left" else (0, missing), value=value)


def first_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Places of `lengths` by row: the longest first, each into the first row that has room for it. One longer than
    `limit` has a row of its own."""
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        row = next((row for row, free in enumerate(room) if lengths[place] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(limit)
        rows[row].append(place)
        room[row] -= lengths[place]
    return rows


def pack(samples: Sequence[Encoded]) -> Encoded:
    """Samples behind one another, as one row; media in the order of their samples."""
    row = {}
    for key in sorted({key for sample in samples for key in sample} - {"attention_mask"}):
        tensors = [sample[key] for sample in samples if key in sample]
        row[key] = torch.cat(tensors, dim=1) if key in PER_TOKEN else join(tensors)
    row["position_ids"] = torch.cat([torch.arange(sample["input_ids"].shape[1]) for sample in samples])[None]
    return row


def join(tensors: list[Tensor]) -> Tensor:
    """Concatenated along the first dimension; the others (crops a picture, say) are padded with zeros to the
    largest."""
    sizes = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].dim())]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(F.pad(tensor, [p for m in reversed(missing) for p in (0, m)]) if any(missing) else tensor)
    return torch.cat(padded)
