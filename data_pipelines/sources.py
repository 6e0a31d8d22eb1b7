"""Data sources: one entry of `data.train` or of a benchmark's data, opened as a sequence of samples. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.formats.registry import guess_row_format
from data_pipelines.index import REJECTED, Index, open_index
from data_pipelines.mixture import take
from data_pipelines.rows import RowError, data_files, reader_class
from data_pipelines.samples import Rejected, Sample
from mmdora.core.config import SourceConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

MAX_GUESS_ROWS = 20  # rows read to guess a file's format
IMAGES, VIDEOS = 1, 2  # bits of `kinds`


class Source(Sequence[Sample]):
    """The samples of one source, each parsed when it is accessed.

    `text` (estimated tokens), `images` and `videos` (counts) and `kinds` (bits IMAGES, VIDEOS) are arrays over the
    samples. `rejected` lists the rows that are not valid samples.
    """

    def __init__(self, index: Index, taken: np.ndarray, weight: float = 1.0):
        usable = (index.flags[taken] & REJECTED) == 0
        self._index, self.weight, self.path = index, weight, index.path
        self.positions, self._rejected = taken[usable], taken[~usable]  # positions in the index
        unusable = set(self._rejected.tolist())
        self.rejected: list[Rejected] = (
            [row for position, row in index.rejected() if position in unusable] if unusable else []
        )
        self.text, self.images, self.videos = (a[self.positions] for a in (index.text, index.images, index.videos))
        self.kinds = (IMAGES * (self.images > 0) + VIDEOS * (self.videos > 0)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def media_folder(self) -> str:
        """The folder that the paths of images and videos start from."""
        return self._index.root

    def part(self, chosen: np.ndarray, with_rejected: bool = False) -> Source:
        """Return a source of the samples that `chosen`, bool [samples], selects, with all rejected rows or none."""
        rejected = self._rejected if with_rejected else self._rejected[:0]
        return Source(self._index, np.sort(np.concatenate([self.positions[chosen], rejected])), self.weight)

    @property
    def total(self) -> int:
        """The number of rows: samples plus rejected rows."""
        return len(self) + len(self.rejected)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        """Parse and return a sample. Raises SampleError if its row can no longer be read, or if a media file is a link
        that leaves the media folder."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self._index.sample(int(self.positions[at]))


def read_source(config: SourceConfig, seed: int = 0) -> Source:
    """Open one source. `seed` makes a random `take` reproducible.

    Raises UserError that names the file if it is missing, unreadable or has no usable sample.
    """
    path = find_path(config.path)
    media = find_path(config.media) if config.media else path if path.is_dir() else path.parent
    if config.media and not media.is_dir():
        raise UserError(f"{config.path}: no such media folder {config.media!r}")
    dataset_format = DATASET_FORMATS[config.format or guess_format(path)]()
    index = open_index(dataset_format, path, media, config.where)
    source = Source(index, take(len(index), config.take, seed, path.name), config.weight)
    if not source:
        details = " among the rows selected by `where`" if config.where else ""
        if source.rejected:
            first = source.rejected[0]
            details += f"; {len(source.rejected)} rows were rejected, the first, {first.id!r}: {first.reason}"
        raise UserError(f"{path}: no usable sample{details}")
    return source


def guess_format(path: Path) -> str:
    """Return the name of the format that fits a file's suffix or first rows. Raises UserError if none fits."""
    files = data_files(path)
    suffix = files[0].suffix
    if suffix in (".tar", ".parquet", ".arrow"):
        return "webdataset" if suffix == ".tar" else "huggingface"
    rows: list[Any] = list(itertools.islice(reader_class(files)(files, Path()).scan(), MAX_GUESS_ROWS))
    names = [name for row in rows if (name := guess_row_format(row))]
    if names:
        return names[0]
    details = ""
    if rows and isinstance(rows[0], dict):
        details = f" (keys of the first row: {', '.join(map(repr, rows[0]))[:200]})"
    if rows and all(isinstance(row, RowError) for row in rows):
        details = f" (none of the first {len(rows)} rows can be read; the first: {rows[0]})"
    known = ", ".join(DATASET_FORMATS)
    raise UserError(f"{path}: cannot guess the format{details}; set `format` to one of {known}")


def ledger_names(sources: Sequence[Source], key: str = "train") -> list[str]:
    """Return the name of each source in the ledger: its path, followed by its config key (`data.train.1`) if it is a
    validation source or if several training sources have the same path."""
    paths = [str(source.path) for source in sources]
    unique = [key == "train" and paths.count(path) == 1 for path in paths]
    return [
        path if alone else f"{path} (data.{key}.{i})" for i, (path, alone) in enumerate(zip(paths, unique, strict=True))
    ]
