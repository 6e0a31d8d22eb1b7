"""Collate encoded samples into one batch: pad or pack token sequences, concatenate media tensors."""

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
    """Collates samples into `input_ids`, `labels`, `attention_mask` [sequences, longest] and media tensors.

    `fillers` are appended to a batch that lacks their kind of media; they are keyed by the pixel tensor that they
    bring (see Encoder.filler). With `pack`, samples are concatenated into sequences of at most so many tokens. Then
    `position_ids` restart at each sample and take the place of `attention_mask` (see mmdora.training.packing).
    """

    pad_token_id: int
    side: Literal["left", "right"] = "right"
    fillers: dict[str, Encoded] = field(default_factory=dict)
    pack: int | None = None  # tokens

    def __call__(self, samples: Sequence[Encoded]) -> Encoded:
        samples = list(samples)
        samples += [filler for key, filler in self.fillers.items() if not any(key in sample for sample in samples)]
        sequences = samples
        if self.pack is not None:
            lengths = [sample["input_ids"].shape[1] for sample in samples]
            sequences = [pack([samples[i] for i in group]) for group in first_fit(lengths, self.pack)]
        length = max(sequence["input_ids"].shape[1] for sequence in sequences)
        batch = {}
        for key in sorted({key for sequence in sequences for key in sequence}):
            tensors = [sequence[key] for sequence in sequences if key in sequence]
            if key == "position_ids":
                # The positions of padding restart at 0 too: to the model, padding is one more sample.
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
    """Group the indices of `lengths` by first-fit decreasing: longest first, each into the first group with room for
    it. A length over `limit` gets a group of its own."""
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        group = next((group for group, free in enumerate(room) if lengths[i] <= free), len(groups))
        if group == len(groups):
            groups.append([])
            room.append(limit)
        groups[group].append(i)
        room[group] -= lengths[i]
    return groups


def pack(samples: Sequence[Encoded]) -> Encoded:
    """Concatenate samples into one sequence with `position_ids` that restart at each sample; media keep the order of
    their samples."""
    sequence = {}
    for key in sorted({key for sample in samples for key in sample} - {"attention_mask"}):
        tensors = [sample[key] for sample in samples if key in sample]
        sequence[key] = torch.cat(tensors, dim=1) if key in PER_TOKEN else join(tensors)
    sequence["position_ids"] = torch.cat([torch.arange(sample["input_ids"].shape[1]) for sample in samples])[None]
    return sequence


def join(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the first dimension. The other dimensions (crops per image, for example) are zero-padded to
    the largest."""
    sizes = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].dim())]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(F.pad(tensor, [p for m in reversed(missing) for p in (0, m)]) if any(missing) else tensor)
    return torch.cat(padded)
