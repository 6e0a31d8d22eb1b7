"""Hugging Face datasets on disk: a `save_to_disk` folder, or Parquet and Arrow files, with embedded media.

    datasets.Dataset.from_list([{"image": …, "question": "What is it?", "answer": "A cat."}]).save_to_disk("cats")

The columns are the keys of any other format (`messages`, `conversations`, `question` …), which is recognized for each
row. Images are `datasets.Image` columns or bytes. Source: https://huggingface.co/docs/datasets/about_arrow
"""

from __future__ import annotations

from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, guess_row_format
from data_pipelines.rows import RowError
from data_pipelines.samples import Sample


class Container(Format):
    """Rows of any other format, recognized by their keys. A column that is null counts as missing."""

    def parse(self, row: Any, place: Place) -> Sample:
        if isinstance(row, dict):
            row = {key: value for key, value in row.items() if value is not None}
        name = guess_row_format(row)
        if name is None:
            keys = ", ".join(map(repr, list(row)[:12])) if isinstance(row, dict) else type(row).__name__
            raise RowError(f"its keys fit no format: {keys[:200]}")
        return DATASET_FORMATS[name]().parse(row, place)


@DATASET_FORMATS.register("huggingface")
class HuggingFace(Container):
    """Hugging Face datasets on disk: `save_to_disk` folders, Parquet and Arrow files, with embedded media."""
