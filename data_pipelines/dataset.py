"""The training dataset: sources mixed into one epoch, with samples encoded on demand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from statistics import median

import numpy as np
import torch
from torch.utils.data import Dataset

from data_pipelines.encoding import Encoded, Encoder, MediaKind
from data_pipelines.ledger import Entry, Ledger, from_change, from_error
from data_pipelines.mixture import epoch, shares
from data_pipelines.samples import Image, Sample, SampleError, Video
from data_pipelines.sources import IMAGES, VIDEOS, Source, guess_format, ledger_names, read_source
from mmdora.core.errors import UserError

__all__ = [
    "IMAGES",
    "VIDEOS",
    "Source",
    "TrainDataset",
    "estimate_lengths",
    "guess_format",
    "kinds_in",
    "ledger_names",
    "read_source",
]

MAX_MEASURED = 8  # samples per source that are encoded to measure the tokens of an image or a video
DEFAULT_MEDIA_TOKENS = 576  # if none of these samples can be encoded: LLaVA-1.5's tokens per image
MAX_ATTEMPTS = 100  # samples tried for one item of the epoch


class TrainDataset(Dataset[Encoded]):
    """Encoded samples of all sources, mixed by weight and temperature (data_pipelines/mixture.py).

    `lengths` (estimated tokens) and `kinds` (bits IMAGES, VIDEOS) are arrays over the items, for samplers. A sample
    that cannot be used is recorded in the ledger and replaced by another one, which is drawn from the seed. The
    replacement is the same in every run, and it is not the neighbour, which would then be seen twice. `index` [1] of an
    item is the position in the epoch of the sample that it holds.
    """

    def __init__(self, sources: Sequence[Source], encoder: Encoder, ledger: Ledger, seed: int, temperature: float = 1):
        self.sources, self.encoder, self.ledger, self.seed = sources, encoder, ledger, seed
        sizes = [len(source) for source in sources]
        amounts = shares(sizes, [source.weight for source in sources], temperature)
        if not sum(amounts):
            raise UserError("the epoch has no sample: the share of every source rounds to 0; raise data.train.*.weight")
        self.ends, self.names = np.cumsum(sizes), ledger_names(sources)
        self.order = epoch(sizes, amounts, seed, [source.path.name for source in sources])
        self.kinds = np.concatenate([source.kinds for source in sources])[self.order]

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Estimated tokens per item, int64 [items], equal in every process. Computed on first access, because it
        encodes media."""
        return np.concatenate([estimate_lengths(source, self.encoder) for source in self.sources])[self.order]

    def __getitem__(self, index: int) -> Encoded:
        chosen = index
        for attempt in range(MAX_ATTEMPTS):
            try:
                sample = self.sample(chosen)
                encoded = self.encoder.encode(sample, lambda why: self._record(chosen, from_change(sample, why)))  # noqa: B023
                return encoded | {"index": torch.tensor([chosen])}
            except SampleError as error:
                self._record(chosen, from_error(error))
                chosen = random.Random(f"{self.seed} {index} {attempt}").randrange(len(self))
        raise UserError(f"{MAX_ATTEMPTS} samples in a row cannot be used; see {self.ledger.path}")

    def sample(self, index: int) -> Sample:
        """Return the sample at a position of the epoch. Raises SampleError."""
        number, i = int(self.order[index]), self._source_of(index)
        return self.sources[i][number - int(self.ends[i]) + len(self.sources[i])]

    def _source_of(self, index: int) -> int:
        return int(np.searchsorted(self.ends, self.order[index], "right"))

    def record_untrained(self, indices: Sequence[int], reason: str) -> list[str]:
        """Record samples of a skipped optimizer step in the ledger. Returns their ids."""
        samples = [(index, self.sample(index)) for index in dict.fromkeys(indices)]
        for index, sample in samples:
            self._record(index, replace(from_change(sample, reason), stage="train"))
        return [sample.id for _, sample in samples]

    def _record(self, index: int, entry: Entry) -> None:
        self.ledger.record(replace(entry, source=self.names[self._source_of(index)]))

    def media_kinds(self) -> list[MediaKind]:
        """Return the kinds of media that occur in the samples: Image, Video, both or none."""
        return kinds_in(self.kinds)


def kinds_in(kinds: np.ndarray) -> list[MediaKind]:
    """Return the kinds of media that the bits IMAGES and VIDEOS of an array stand for."""
    bits = int(np.bitwise_or.reduce(kinds, initial=0))
    return [kind for kind, bit in ((Image, IMAGES), (Video, VIDEOS)) if bits & bit]


def estimate_lengths(source: Source, encoder: Encoder) -> np.ndarray:
    """Estimate the tokens of each sample, int64 [samples]: its text by its bytes, its media by encoding a few
    samples."""
    lengths = source.text.astype(np.int64)
    for kind, counts in ((IMAGES, source.images), (VIDEOS, source.videos)):
        if counts.any():
            lengths += counts.astype(np.int64) * _tokens_per_medium(source, encoder, kind)
    return lengths


def _tokens_per_medium(source: Source, encoder: Encoder, kind: int) -> int:
    """Return the median number of tokens of an image or a video, over evenly spaced samples that have this kind only;
    if there are none, over samples that have both."""
    positions = np.flatnonzero(source.kinds == kind)
    positions = positions if len(positions) else np.flatnonzero(source.kinds & kind)
    count = min(MAX_MEASURED, len(positions))
    tokens = []
    for i in range(count):
        at = int(positions[i * len(positions) // count])
        with suppress(SampleError):
            tokens.append(encoder.media_tokens(source[at]) / int(source.images[at] + source.videos[at]))
    return round(median(tokens)) if tokens else DEFAULT_MEDIA_TOKENS
