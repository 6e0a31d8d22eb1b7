"""Held-out samples, whose loss is told while a model trains: each once, in an order that never changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from data_pipelines.collator import Collator
from data_pipelines.dataset import Source, kinds_in, ledger_names
from data_pipelines.encoding import Encoded, Encoder, MediaKind
from data_pipelines.ledger import Ledger, from_change, from_error
from data_pipelines.samples import SampleError


class HeldOutDataset(Dataset[Encoded | None]):
    """Encoded samples of `data.validation`. None stands for one that cannot be used, which is in the ledger."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder, ledger: Ledger):
        self.sources, self.encoder, self.ledger = sources, encoder, ledger
        self.names = ledger_names(sources, "validation")
        self.places = [(i, at) for i, source in enumerate(sources) for at in range(len(source))]
        self.kinds = np.concatenate([source.kinds for source in sources])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Encoded | None:
        i, at = self.places[index]
        try:
            sample = self.sources[i][at]
            return self.encoder.encode(
                sample, lambda why: self.ledger.record(replace(from_change(sample, why), source=self.names[i]))
            )
        except SampleError as error:
            self.ledger.record(replace(from_error(error), source=self.names[i]))
            return None

    def media_kinds(self) -> list[MediaKind]:
        return kinds_in(self.kinds)


class HeldOutCollator:
    """Batches of usable samples; `blank` is the only row of a batch that has none."""

    def __init__(self, collator: Collator, blank: Encoded):
        self.collator, self.blank = collator, blank

    def __call__(self, rows: Sequence[Encoded | None]) -> Encoded:
        return self.collator([row for row in rows if row is not None] or [self.blank])
