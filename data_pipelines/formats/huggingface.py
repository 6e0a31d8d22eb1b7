"""Datasets of Hugging Face on disk: a `save_to_disk` folder, or Parquet and Arrow files, with media inside them.

    datasets.Dataset.from_list([{"image": …, "question": "What is it?", "answer": "A cat."}]).save_to_disk("cats")

Columns are the keys of any other format (`messages`, `conversations`, `question` …): the format is told from them, row
by row. Pictures are `datasets.Image` columns or bytes. Source: https://huggingface.co/docs/datasets/about_arrow
"""

from __future__ import annotations

from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, recognise
from data_pipelines.rows import RowError
from data_pipelines.samples import Sample


class Container(Format):
    """Rows of any form, told by their keys; columns that are null are as if absent."""

    def parse(self, row: Any, place: Place) -> Sample:
        if isinstance(row, dict):
            row = {key: value for key, value in row.items() if value is not None}
        name = recognise(row)
        if name is None:
            keys = ", ".join(map(repr, list(row)[:12])) if isinstance(row, dict) else type(row).__name__
            raise RowError(f"its keys are those of no format: {keys[:200]}")
        return DATASET_FORMATS[name]().parse(row, place)


@DATASET_FORMATS.register("huggingface")
class HuggingFace(Container):
    """Datasets of Hugging Face on disk: `save_to_disk` folders, Parquet and Arrow files, with media inside."""
