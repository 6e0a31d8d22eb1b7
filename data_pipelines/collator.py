"""Encoded samples as one batch: token sequences padded, media tensors joined."""

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
    """`fillers` are rows that a batch without such media gets, by the key of the pixels that they bring (see
    Encoder.filler)."""

    pad_token_id: int
    side: Literal["left", "right"] = "right"
    fillers: dict[str, Encoded] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Encoded]) -> Encoded:
        rows = list(rows)
        rows += [filler for key, filler in self.fillers.items() if not any(key in row for row in rows)]
        length = max(row["input_ids"].shape[1] for row in rows)
        batch = {}
        for key in sorted({key for row in rows for key in row}):
            tensors = [row[key] for row in rows if key in row]
            if key in PER_TOKEN:
                value = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(key, 0)
                batch[key] = torch.cat([self._pad(t, length, value) for t in tensors])
            else:
                batch[key] = join(tensors)
        return batch

    def _pad(self, tensor: Tensor, length: int, value: int) -> Tensor:
        missing = length - tensor.shape[1]
        return F.pad(tensor, (missing, 0) if self.side == "left" else (0, missing), value=value)


def join(tensors: list[Tensor]) -> Tensor:
    """Concatenated along the first dimension; the others (crops a picture, say) are padded with zeros to the
    largest."""
    sizes = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].dim())]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(F.pad(tensor, [p for m in reversed(missing) for p in (0, m)]) if any(missing) else tensor)
    return torch.cat(padded)
