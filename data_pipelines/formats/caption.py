"""Captions: `caption` (or `captions`, a list) and `image` or `video`.

    {"image": "cat.jpg", "caption": "A cat sleeps on a red sofa."}

The question is the row's own `prompt`, else "Describe the image." or "Describe the video.". Of several captions the
first is learnt, and benchmarks see all. Source, of which each row joins an image and its captions:
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
    """Captions: `caption` (or `captions`, a list) and `image` or `video`; "Describe the image." asks for them."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return not {"caption", "captions"}.isdisjoint(row) and {"question", "messages", "conversations"}.isdisjoint(row)

    def parse(self, row: Any, place: Place) -> Sample:
        if not isinstance(row, dict):
            raise RowError(f"expected an object with 'caption', found {type(row).__name__}")
        key = "captions" if row.get("captions") is not None else "caption"
        captions = row.get(key) if isinstance(row.get(key), list) else [row.get(key)]
        assert isinstance(captions, list)
        if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise RowError(f"{key!r} must be a string or a list of strings, none empty; found {shown(row.get(key))}")
        files = row_media(row, place)
        if not files:
            raise RowError("a caption needs an 'image' or a 'video'")
        what = "video" if isinstance(files[0], Video) else "image" if len(files) == 1 else "images"
        question = text_of(row, "prompt", f"Describe the {what}.")
        turns = conversation([("user", question, True), ("assistant", captions[0], True)], files)
        return place.sample(turns, row.get("category"), captions if len(captions) > 1 else None)
