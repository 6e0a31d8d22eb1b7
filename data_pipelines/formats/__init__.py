"""Dataset formats, one file each; importing the package registers them all."""

from data_pipelines.formats import llava, nlvr, shapes
from data_pipelines.formats.registry import DATASET_FORMATS

__all__ = ["DATASET_FORMATS", "llava", "nlvr", "shapes"]
