"""NLVR 1.0 in its official layout: a JSON-lines file beside `images/<directory>/<split>-<identifier>-<0…5>.png`.

One sample for each picture that is there: an official split has six permutations of the boxes for every sentence, a
subset fewer. Source: https://github.com/lil-lab/nlvr/tree/master/nlvr
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Where
from data_pipelines.formats.rows import kept, read_lines
from data_pipelines.samples import Image, Message, Rejected, Sample, Text

PERMUTATIONS = 6
PROMPT = "{sentence}\nIs this true or false?"


@DATASET_FORMATS.register("nlvr")
def read_nlvr(path: Path, media: Path, where: Where) -> Iterator[Sample | Rejected]:
    for number, row in enumerate(read_lines(path)):
        if where and not kept(row, where):
            continue
        if reason := _fault(row):
            yield Rejected(f"row-{number}", str(path), reason)
            continue
        label = row["label"].lower()
        pictures = [_picture(path, media, row, k) for k in range(PERMUTATIONS)]
        found = [p for p in pictures if p.is_file()]
        if not found:
            yield Rejected(row["identifier"], str(path), f"none of its pictures is there: {pictures[0]} …")
        for picture in found:
            question = Message("user", (Image(picture), Text(PROMPT.format(sentence=row["sentence"].strip()))))
            answer = Message("assistant", (Text(label),))
            yield Sample(picture.name, (question, answer), str(path), f"directory {row['directory']}")


def _fault(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"expected an object, found {type(row).__name__}"
    for key in ("sentence", "label", "identifier", "directory"):
        if not isinstance(row.get(key), str):
            return f"{key!r} must be a string, found {row.get(key)!r}"
    if row["label"].lower() not in ("true", "false"):
        return f"'label' must be true or false, found {row['label']!r}"
    if not row["directory"].isdigit() or not row["identifier"].replace("-", "").isdigit():
        return f"'directory' and 'identifier' must be numbers, found {row['directory']!r} and {row['identifier']!r}"
    return None


def _picture(path: Path, media: Path, row: dict[str, str], permutation: int) -> Path:
    return media / "images" / row["directory"] / f"{path.stem}-{row['identifier']}-{permutation}.png"
