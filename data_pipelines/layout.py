"""How the tensors of single samples form a batch: a layout per key, found by probing the processor.

Processors arrange their tensors in many ways. LLaVA's `pixel_values` [images, 3, H, W] count images, Idefics' [1,
images, 3, H, W] count samples, MiniCPM-V's [1, 3, patch, patches * patch] are one long strip, and Mllama's
`cross_attention_mask` [1, tokens, images, tiles] belongs to the tokens. The processor's own batch of two samples
shows which is which.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from PIL import Image as PILImage
from torch import Tensor

from data_pipelines.video import SampledVideo

Encoded = dict[str, Tensor]
Media = PILImage.Image | SampledVideo  # loaded media
# Encodes a batch of conversations, each with these media and the text; None if the processor rejects them.
Probe = Callable[[Sequence[tuple[list[Media], str]]], Encoded | None]

TOKEN_KEYS = ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids")
SHORT, LONG = "Look.", "Look at it, and say what it is and where it stands."
FRAMES = 4  # per probed video


@dataclass(frozen=True)
class Layout:
    """The meaning of each key of an encoded sample. Other keys count media along their first dimension."""

    per_token: frozenset[str] = frozenset(TOKEN_KEYS)  # [1, tokens, ...]
    # [1, ...], however many media the sample has, and needed of every sample: its tokens address media by their number.
    per_sample: frozenset[str] = frozenset()
    # The dimension along which the samples' tensors are concatenated.
    dimensions: Mapping[str, int] = field(default_factory=dict)
    # [media, crops, ...] with any number of crops, which the processor never pads: the crops are concatenated.
    unpadded: frozenset[str] = frozenset()
    # Indices into another tensor of the sample: its key, and how many of its first dimensions they count.
    references: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def find_layout(probe: Probe, kinds: Collection[type[Media]]) -> Layout:
    """Return the layout of a processor's tensors for these kinds of media.

    A tensor belongs to the tokens if it has their number in every sample. Otherwise, the dimension in which the batch
    of two samples has the sum of their sizes is the one to concatenate. It counts samples, not media, if a sample of
    two media has the size 1 there.
    """
    per_token, per_sample, unpadded = set(TOKEN_KEYS), set(), set()
    dimensions, references, addressed = {}, {}, False
    for kind in kinds:
        small, large = _media(kind)
        first, second = probe([([small], SHORT)]), probe([([large], LONG)])
        if first is None or second is None:
            continue
        batch, rows = probe([([small], SHORT), ([large], LONG)]), (first, second)
        if uneven := batch is None:  # the processor pads nothing: it batches equal media only
            batch, rows = probe([([small], SHORT)] * 2), (first, first)
        both = probe([([small, large], SHORT)]) or probe([([small, small], SHORT)])
        for key in first.keys() & second.keys():
            if all(_is_per_token(key, encoded) for encoded in (first, second, both) if encoded and key in encoded):
                per_token.add(key)
                addressed |= first[key].dim() > 2
            elif batch is not None and key in batch:
                dimensions[key] = _concatenated([row[key] for row in rows], batch[key])
                if dimensions[key] == 0 and both is not None and len(first[key]) == len(both.get(key, ())) == 1:
                    per_sample.add(key)
                if reference := _reference(rows[0], rows[1][key], batch[key]):
                    references[key] = reference
                if uneven and first[key].shape[1:] != second[key].shape[1:]:
                    unpadded.add(key)
    if not addressed:  # the model takes the media of all samples together, and puts them where their tokens are
        per_sample.clear()
    return Layout(frozenset(per_token), frozenset(per_sample), dimensions, frozenset(unpadded), references)


def layout_of(samples: Sequence[Encoded]) -> Layout:
    """Guess the layout from encoded samples alone: every tensor that has the number of tokens belongs to the tokens."""
    keys = {key for sample in samples for key in sample}
    per_token = [key for key in keys if all(_is_per_token(key, sample) for sample in samples if key in sample)]
    return Layout(frozenset(per_token))


def _is_per_token(key: str, encoded: Encoded) -> bool:
    return encoded[key].shape[:2] == encoded["input_ids"].shape


def _concatenated(rows: Sequence[Tensor], batch: Tensor) -> int:
    """Return the first dimension in which the batch has the sum of the rows' sizes, and the largest in all others."""
    sizes = list(zip(*(row.shape for row in rows), strict=True))
    for dimension in range(batch.dim()):
        expected = [sum(size) if d == dimension else max(size) for d, size in enumerate(sizes)]
        if list(batch.shape) == expected:
            return dimension
    return 0


def _reference(first: Encoded, second: Tensor, batch: Tensor) -> tuple[str, int] | None:
    """Return what a tensor holds indices into, if they are higher in a batch, by what the first sample has of it.
    Negative indices stand for none."""
    if second.is_floating_point() or second.dim() == 0 or batch.shape[1:] != second.shape[1:]:
        return None
    shifts = (batch[len(batch) - len(second) :].long() - second.long())[second >= 0].unique().tolist()
    if len(shifts) != 1 or shifts == [0]:
        return None
    sizes = {prod(tensor.shape[:n]): (key, n) for key, tensor in first.items() for n in range(1, tensor.dim())}
    return sizes.get(shifts[0])


def _media(kind: type[Media]) -> tuple[Media, Media]:
    """Return two blank media whose shapes give different numbers of crops and patches."""
    sizes = ((64, 64), (56, 168))  # width, height
    if kind is SampledVideo:
        frames = [np.zeros((FRAMES, height, width, 3), np.uint8) for width, height in sizes]
        return blank_video(frames[0]), blank_video(frames[1])
    return PILImage.new("RGB", sizes[0]), PILImage.new("RGB", sizes[1])


def blank_video(frames: np.ndarray) -> SampledVideo:
    """Return a video of one frame per second."""
    times = tuple(map(float, range(len(frames))))
    return SampledVideo(frames, tuple(range(len(frames))), 1.0, len(frames), times=times, duration=float(len(frames)))
