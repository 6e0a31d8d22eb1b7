"""DATASET_FORMATS: `data.train.*.format` → a reader of `(path, media root)` into samples and rejected rows."""

from collections.abc import Callable, Iterable
from pathlib import Path

from data_pipelines.samples import Rejected, Sample
from mmdora.registry import Registry

Reader = Callable[[Path, Path], Iterable[Sample | Rejected]]

DATASET_FORMATS: Registry[Reader] = Registry("dataset format")
