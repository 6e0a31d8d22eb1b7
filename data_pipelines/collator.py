"""Collate encoded samples into one batch: pad or pack token sequences, concatenate media tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipelines.encoding import IGNORED
from data_pipelines.layout import Encoded, Layout, layout_of


@dataclass(frozen=True)
class Collator:
    """Collates samples into `input_ids`, `labels`, `attention_mask` [sequences, longest] and media tensors.

    `layout` is that of the encoder that encoded the samples; None guesses it from the samples. `fillers` are appended
    to a batch that lacks their kind of media; they are keyed by the pixel tensor that they bring (see
    Encoder.filler). With `pack`, samples are concatenated into sequences of at most so many tokens. Then
    `position_ids` restart at each sample and take the place of `attention_mask` (see mmdora.training.packing).
    """

    pad_token_id: int
    side: Literal["left", "right"] = "right"
    fillers: dict[str, Encoded] = field(default_factory=dict)
    pack: int | None = None  # tokens
    layout: Layout | None = None

    def __call__(self, samples: Sequence[Encoded]) -> Encoded:
        samples = list(samples)
        samples += [filler for key, filler in self.fillers.items() if not any(key in sample for sample in samples)]
        layout = self.layout or layout_of(samples)
        sequences = samples
        if self.pack is not None:
            lengths = [sample["input_ids"].shape[1] for sample in samples]
            sequences = [pack([samples[i] for i in group], layout) for group in first_fit(lengths, self.pack)]
        length = max(sequence["input_ids"].shape[1] for sequence in sequences)
        batch = {}
        for key in sorted({key for sequence in sequences for key in sequence}):
            if key == "position_ids":
                # The positions of padding restart at 0 too: to the model, padding is one more sample.
                tensors = [sequence[key] for sequence in sequences]
                batch[key] = torch.cat([torch.cat([t, torch.arange(length - t.shape[1])[None]], 1) for t in tensors])
            elif key in layout.per_token:
                value = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(key, 0)
                batch[key] = join([self._pad(t, length, value) for t in per_token(key, sequences)])
            elif key in layout.per_sample and self.pack is None:
                batch[key] = join(per_sample(key, sequences))
            else:
                batch[key] = join_media(key, sequences, layout)
        return batch

    def _pad(self, tensor: Tensor, length: int, value: int) -> Tensor:
        missing = length - tensor.shape[1]
        padding = (missing, 0) if self.side == "left" else (0, missing)
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + padding, value=value)


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


def pack(samples: Sequence[Encoded], layout: Layout) -> Encoded:
    """Concatenate samples into one sequence with `position_ids` that restart at each sample; media keep the order of
    their samples."""
    sequence = {}
    for key in sorted({key for sample in samples for key in sample} - {"attention_mask"}):
        in_order = key in layout.per_token
        sequence[key] = join(per_token(key, samples), dim=1) if in_order else join_media(key, samples, layout)
    sequence["position_ids"] = torch.cat([torch.arange(sample["input_ids"].shape[1]) for sample in samples])[None]
    return sequence


def per_token(key: str, samples: Sequence[Encoded]) -> list[Tensor]:
    """Return each sample's tensor [1, tokens, ...]; zeros for a sample without it, such as one without media."""
    present, value = next(sample[key] for sample in samples if key in sample), IGNORED if key == "labels" else 0
    return [
        sample[key] if key in sample else present.new_full((*sample["input_ids"].shape, *present.shape[2:]), value)
        for sample in samples
    ]


def per_sample(key: str, samples: Sequence[Encoded]) -> list[Tensor]:
    """Return each sample's tensor [1, ...]; zeros for a sample without it."""
    present = next(sample[key] for sample in samples if key in sample)
    return [sample[key] if key in sample else torch.zeros_like(present) for sample in samples]


def join_media(key: str, samples: Sequence[Encoded], layout: Layout) -> Tensor:
    """Concatenate the tensors of the samples that have them, as the processor does."""
    tensors = [sample[key] for sample in samples if key in sample]
    if key in layout.references:
        tensors = shifted(key, samples, *layout.references[key])
    if key in layout.unpadded:
        return join([tensor.flatten(0, 1)[None] for tensor in tensors], dim=1)
    return join(tensors, layout.dimensions.get(key, 0))


def shifted(key: str, samples: Sequence[Encoded], target: str, dimensions: int) -> list[Tensor]:
    """Return the samples' indices into the first dimensions of another tensor, as indices into the batch's tensor."""
    tensors, start = [], 0
    for sample in samples:
        if key in sample:
            tensors.append(torch.where(sample[key] >= 0, sample[key] + start, sample[key]))
            start += prod(sample[target].shape[:dimensions])
    return tensors


def join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate along a dimension. The others (crops per image, for example) are zero-padded to the largest."""
    sizes = [max(size) for size in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [0 if d == dim else size - tensor.shape[d] for d, size in enumerate(sizes)]
        padded.append(F.pad(tensor, [p for m in reversed(missing) for p in (0, m)]) if any(missing) else tensor)
    return torch.cat(padded, dim)
