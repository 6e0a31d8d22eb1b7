"""Dataset formats, one file each. Importing the package registers all of them; it imports neither torch nor PIL."""

from data_pipelines.formats import (
    alpaca,
    caption,
    huggingface,
    llava,
    messages,
    nlvr,
    shapes,
    sharegpt,
    vqa,
    webdataset,
)
from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place

__all__ = [
    "DATASET_FORMATS",
    "Format",
    "Place",
    "alpaca",
    "caption",
    "huggingface",
    "llava",
    "messages",
    "nlvr",
    "shapes",
    "sharegpt",
    "vqa",
    "webdataset",
]
