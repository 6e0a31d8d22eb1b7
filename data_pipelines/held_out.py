"""Validation data: each sample of `data.validation` once, in a fixed order, for the loss during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from data_pipelines.collator import Collator
from data_pipelines.dataset import kinds_in
from data_pipelines.encoding import Encoded, Encoder, MediaKind
from data_pipelines.ledger import Ledger, from_change, from_error
from data_pipelines.samples import SampleError
from data_pipelines.sources import Source, ledger_names


class HeldOutDataset(Dataset[Encoded | None]):
    """Encoded samples of `data.validation`. A sample that cannot be used is None, and recorded in the ledger."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder, ledger: Ledger):
        self.sources, self.encoder, self.ledger = sources, encoder, ledger
        self.names = ledger_names(sources, "validation")
        self.items = [(i, at) for i, source in enumerate(sources) for at in range(len(source))]
        self.kinds = np.concatenate([source.kinds for source in sources])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Encoded | None:
        i, at = self.items[index]
        try:
            sample = self.sources[i][at]
            return self.encoder.encode(
                sample, lambda why: self.ledger.record(replace(from_change(sample, why), source=self.names[i]))
            )
        except SampleError as error:
            self.ledger.record(replace(from_error(error), source=self.names[i]))
            return None

    def media_kinds(self) -> list[MediaKind]:
        """Return the kinds of media that occur in the samples: Image, Video, both or none."""
        return kinds_in(self.kinds)


class HeldOutCollator:
    """Collates the usable samples of a batch; a batch without any holds `blank` alone."""

    def __init__(self, collator: Collator, blank: Encoded):
        self.collator, self.blank = collator, blank

    def __call__(self, samples: Sequence[Encoded | None]) -> Encoded:
        return self.collator([sample for sample in samples if sample is not None] or [self.blank])
