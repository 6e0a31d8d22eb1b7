"""DATASET_FORMATS: `data.train.*.format` → a reader of `(path, media root, where)` into samples and rejected rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from data_pipelines.samples import Rejected, Sample
from mmdora.registry import Registry

Where = Mapping[str, Sequence[str | int]]  # a row is kept if each named field has one of the values
Reader = Callable[[Path, Path, Where], Iterable[Sample | Rejected]]

DATASET_FORMATS: Registry[Reader] = Registry("dataset format")
