"""Sources read into samples, mixed by weight, and encoded on demand."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from data_pipelines.encoding import Encoded, Encoder
from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.formats.rows import read_rows
from data_pipelines.ledger import Ledger, from_error
from data_pipelines.samples import Image, Rejected, Sample, SampleError, Video
from mmdora.config import SourceConfig, find_path
from mmdora.errors import UserError


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or of a benchmark's data, read."""

    path: Path
    samples: list[Sample]
    rejected: list[Rejected]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, at: int) -> Sample:
        return self.samples[at]

    @property
    def total(self) -> int:
        return len(self.samples) + len(self.rejected)


def read_source(config: SourceConfig) -> Source:
    """Read one source. Raises UserError that names the file, where it is missing, unreadable or empty."""
    path = find_path(config.path)
    # The shapes world makes its files; every other format must find them.
    if config.format != "shapes" and not path.is_file():
        raise UserError(f"{config.path}: no such data file")
    reader = DATASET_FORMATS[config.format or guess_format(path)]
    media = find_path(config.media) if config.media else path.parent
    if config.media and not media.is_dir():
        raise UserError(f"{config.media}: no such media folder (of {config.path})")
    rows = list(reader(path, media, config.where))
    samples = [row for row in rows if isinstance(row, Sample)]
    rejected = [row for row in rows if isinstance(row, Rejected)]
    if not samples:
        why = " that `where` keeps" if config.where else ""
        why += f"; the first of {len(rejected)} rejected: {rejected[0].reason}" if rejected else ""
        raise UserError(f"{path}: holds no usable sample{why}")
    return Source(path, samples, rejected, config.weight)


def guess_format(path: Path) -> str:
    """The format of a file by what is in it. Raises UserError where that says nothing."""
    rows = read_rows(path) if path.suffix in (".json", ".jsonl") else []
    if rows and isinstance(rows[0], dict) and "conversations" in rows[0]:
        return "llava"
    known = ", ".join(DATASET_FORMATS)
    raise UserError(f"{path}: cannot tell the format from the file; say format: one of {known}")


class TrainDataset(Dataset[Encoded]):
    """Encoded samples of all sources; a source of weight 2 counts each of its samples twice an epoch.

    A sample that cannot be encoded goes to the ledger, and another, drawn from a seed, takes its place: the same one
    in every run, and not the neighbour, which would be seen twice.
    """

    def __init__(self, sources: list[Source], encoder: Encoder, ledger: Ledger, seed: int):
        self.encoder, self.ledger, self.seed = encoder, ledger, seed
        self.samples: list[Sample] = []
        for source in sources:
            whole, rest = divmod(source.weight * len(source.samples), len(source.samples))
            shuffled = random.Random(f"{seed} {source.path}").sample(source.samples, len(source.samples))
            self.samples += source.samples * int(whole) + shuffled[: round(rest)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded:
        chosen = index
        for attempt in range(100):
            try:
                return self.encoder.encode(self.samples[chosen])
            except SampleError as error:
                self.ledger.record(from_error(error))
                chosen = random.Random(f"{self.seed} {index} {attempt}").randrange(len(self.samples))
        raise UserError(f"100 samples in a row cannot be used; see {self.ledger.path}")

    def media_kinds(self) -> list[type[Image] | type[Video]]:
        """The kinds of media that occur in the samples: pictures, videos, both or none."""
        kinds = {type(part) for sample in self.samples for part in sample.media()}
        return [kind for kind in (Image, Video) if kind in kinds]
