"""Captions: `caption` (or a list `captions`) and `image` or `video`.

    {"image": "cat.jpg", "caption": "A cat sleeps on a red sofa."}

The question is the row's own `prompt`, or else "Describe the image." or "Describe the video.". If there are several
captions, training uses the first, and benchmarks use all of them. A row joins an image of COCO with its captions:
https://cocodataset.org/#format-data
"""

from __future__ import annotations

from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, shown
from data_pipelines.formats.turns import conversation, row_media, text_of
from data_pipelines.rows import RowError
from data_pipelines.samples import Sample, Video


@DATASET_FORMATS.register("caption")
class Caption(Format):
    """Captions: `caption` (or a list `captions`) and `image` or `video`, with the prompt "Describe the image."."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return not {"caption", "captions"}.isdisjoint(row) and {"question", "messages", "conversations"}.isdisjoint(row)

    def parse(self, row: Any, place: Place) -> Sample:
        if not isinstance(row, dict):
            raise RowError(f"expected an object with 'caption', not {type(row).__name__}")
        key = "captions" if row.get("captions") is not None else "caption"
        captions = row.get(key) if isinstance(row.get(key), list) else [row.get(key)]
        assert isinstance(captions, list)
        if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise RowError(f"{key!r} must be a non-empty string or a list of them, not {shown(row.get(key))}")
        files = row_media(row, place)
        if not files:
            raise RowError("a caption needs an 'image' or a 'video'")
        kind = "video" if isinstance(files[0], Video) else "image" if len(files) == 1 else "images"
        question = text_of(row, "prompt", f"Describe the {kind}.")
        turns = conversation([("user", question, True), ("assistant", captions[0], True)], files)
        return place.sample(turns, row.get("category"), captions if len(captions) > 1 else None)
