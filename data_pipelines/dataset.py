"""Sources of samples, mixed into an epoch, and encoded on demand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from data_pipelines.encoding import Encoded, Encoder, MediaKind
from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.formats.registry import recognise
from data_pipelines.index import REJECTED, Index, open_index
from data_pipelines.ledger import Entry, Ledger, from_change, from_error
from data_pipelines.mixture import epoch, shares, take
from data_pipelines.rows import RowError, data_files, rows_class
from data_pipelines.samples import Image, Rejected, Sample, SampleError, Video
from mmdora.core.config import SourceConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

LOOKED_AT = 20  # rows at most, to tell a file's format
IMAGES, VIDEOS = 1, 2  # bits of `kinds`
MEASURED = 8  # samples of a source at most, to tell what a picture or a clip takes
UNKNOWN = 576  # tokens, where none of these can be encoded: LLaVA-1.5's


class Source(Sequence[Sample]):
    """One entry of `data.train` or of a benchmark's data: its samples, parsed when they are asked for.

    `text` (estimated tokens), `images` and `videos` (counts), and `kinds` (bits IMAGES, VIDEOS) are arrays over the
    samples; `rejected` are the rows that are none.
    """

    def __init__(self, index: Index, taken: np.ndarray, weight: float = 1.0):
        usable = (index.flags[taken] & REJECTED) == 0
        self._index, self.weight, self.path = index, weight, index.path
        self.places = taken[usable]  # of the samples, in the index
        lost = set(taken[~usable].tolist())
        self.rejected: list[Rejected] = [row for at, row in index.rejected() if at in lost] if lost else []
        self.text, self.images, self.videos = (a[self.places] for a in (index.text, index.images, index.videos))
        self.kinds = (IMAGES * (self.images > 0) + VIDEOS * (self.videos > 0)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def total(self) -> int:
        """Rows: samples and rejected ones."""
        return len(self) + len(self.rejected)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        """The sample. Raises SampleError where its row cannot be read any more, or its media leave their root."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self._index.sample(int(self.places[at]))

    def lengths(self, encoder: Encoder) -> np.ndarray:
        """About how many tokens each sample takes: its text as estimated, and its media as the encoder makes them of a
        few samples. int64 [samples]."""
        lengths = self.text.astype(np.int64)
        for kind, counts in ((IMAGES, self.images), (VIDEOS, self.videos)):
            if counts.any():
                lengths += counts.astype(np.int64) * self._cost(encoder, kind)
        return lengths

    def _cost(self, encoder: Encoder, kind: int) -> int:
        """The median of the tokens of a picture or a clip in samples at equal steps over those that have that kind
        alone, or, where none is so, over those that have both."""
        places = np.flatnonzero(self.kinds == kind)
        places = places if len(places) else np.flatnonzero(self.kinds & kind)
        count = min(MEASURED, len(places))
        costs = []
        for i in range(count):
            at = int(places[i * len(places) // count])
            with suppress(SampleError):
                costs.append(encoder.media_tokens(self[at]) / int(self.images[at] + self.videos[at]))
        return round(median(costs)) if costs else UNKNOWN


def read_source(config: SourceConfig, seed: int = 0) -> Source:
    """Open one source; `seed` draws what its `take` leaves to chance. Raises UserError that names the file, where it is
    missing, unreadable or empty."""
    path = find_path(config.path)
    media = find_path(config.media) if config.media else path if path.is_dir() else path.parent
    if config.media and not media.is_dir():
        raise UserError(f"{config.media}: no such media folder (of {config.path})")
    form = DATASET_FORMATS[config.format or guess_format(path)]()
    index = open_index(form, path, media, config.where)
    source = Source(index, take(len(index), config.take, seed, path.name), config.weight)
    if not source:
        why = " that `where` keeps" if config.where else ""
        first = source.rejected[0] if source.rejected else None
        why += f"; the first of {len(source.rejected)} rejected, {first.id!r}: {first.reason}" if first else ""
        raise UserError(f"{path}: holds no usable sample{why}")
    return source


def guess_format(path: Path) -> str:
    """The format of a file by what is in it. Raises UserError where that says nothing."""
    files = data_files(path)
    suffix = files[0].suffix
    if suffix in (".tar", ".parquet", ".arrow"):
        return "webdataset" if suffix == ".tar" else "huggingface"
    rows: list[Any] = list(itertools.islice(rows_class(files)(files, Path()).scan(), LOOKED_AT))
    names = [name for row in rows if (name := recognise(row))]
    if names:
        return names[0]
    keys = f" (its first row has {', '.join(map(repr, rows[0]))[:200]})" if rows and isinstance(rows[0], dict) else ""
    if rows and all(isinstance(row, RowError) for row in rows):
        keys = f" (none of its first {len(rows)} rows can be read; the first: {rows[0]})"
    known = ", ".join(DATASET_FORMATS)
    raise UserError(f"{path}: cannot tell the format from the file{keys}; say format: one of {known}")


def ledger_names(sources: Sequence[Source], key: str = "train") -> list[str]:
    """What the ledger calls each source: its path, with its place in the config where it is one of several of that path
    in `data.train`, or of `data.validation`."""
    paths = [str(source.path) for source in sources]
    plain = [key == "train" and paths.count(path) == 1 for path in paths]
    return [
        path if alone else f"{path} (data.{key}.{i})" for i, (path, alone) in enumerate(zip(paths, plain, strict=True))
    ]


class TrainDataset(Dataset[Encoded]):
    """Encoded samples of all sources, mixed by weight and temperature (data_pipelines/mixture.py).

    `lengths` (about, in tokens) and `kinds` (bits IMAGES, VIDEOS) are arrays over the items, for samplers. A sample
    that cannot be used goes to the ledger, and another, drawn from a seed, takes its place: the same one in every run,
    and not the neighbour, which would be seen twice. `index` [1] of an item is the place of the sample that it holds.
    """

    def __init__(self, sources: Sequence[Source], encoder: Encoder, ledger: Ledger, seed: int, temperature: float = 1):
        self.sources, self.encoder, self.ledger, self.seed = sources, encoder, ledger, seed
        sizes = [len(source) for source in sources]
        amounts = shares(sizes, [source.weight for source in sources], temperature)
        if not sum(amounts):
            raise UserError(
                "the epoch holds no sample: every source's share rounds to nothing; raise data.train.*.weight"
            )
        self.ends, self.names = np.cumsum(sizes), ledger_names(sources)
        self.order = epoch(sizes, amounts, seed, [source.path.name for source in sources])
        self.kinds = np.concatenate([source.kinds for source in sources])[self.order]

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [items]; the same in every process. Media are encoded for it, so it is made when it is asked for."""
        return np.concatenate([source.lengths(self.encoder) for source in self.sources])[self.order]

    def __getitem__(self, index: int) -> Encoded:
        chosen = index
        for attempt in range(100):
            try:
                sample = self.sample(chosen)
                encoded = self.encoder.encode(sample, lambda why: self._record(chosen, from_change(sample, why)))  # noqa: B023
                return encoded | {"index": torch.tensor([chosen])}
            except SampleError as error:
                self._record(chosen, from_error(error))
                chosen = random.Random(f"{self.seed} {index} {attempt}").randrange(len(self))
        raise UserError(f"100 samples in a row cannot be used; see {self.ledger.path}")

    def sample(self, index: int) -> Sample:
        """The sample at a place of the epoch. Raises SampleError."""
        number, i = int(self.order[index]), self._source_of(index)
        return self.sources[i][number - int(self.ends[i]) + len(self.sources[i])]

    def _source_of(self, index: int) -> int:
        return int(np.searchsorted(self.ends, self.order[index], "right"))

    def not_learnt(self, indices: Sequence[int], reason: str) -> list[str]:
        """Write samples that no weight learnt from into the ledger; returns their ids."""
        samples = [(index, self.sample(index)) for index in dict.fromkeys(indices)]
        for index, sample in samples:
            self._record(index, replace(from_change(sample, reason), stage="train"))
        return [sample.id for _, sample in samples]

    def _record(self, index: int, entry: Entry) -> None:
        self.ledger.record(replace(entry, source=self.names[self._source_of(index)]))

    def media_kinds(self) -> list[MediaKind]:
        """The kinds of media that occur in the samples: pictures, videos, both or none."""
        return kinds_in(self.kinds)


def kinds_in(kinds: np.ndarray) -> list[MediaKind]:
    """What an array of bits stands for."""
    bits = int(np.bitwise_or.reduce(kinds, initial=0))
    return [kind for kind, bit in ((Image, IMAGES), (Video, VIDEOS)) if bits & bit]
