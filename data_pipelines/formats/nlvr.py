"""NLVR 1.0 in its official layout: a JSON-lines file next to `images/<directory>/<split>-<identifier>-<0…5>.png`.

There is one sample per existing image: an official split has six permutations of the boxes for every sentence, a subset
has fewer. Source: https://github.com/lil-lab/nlvr/tree/master/nlvr
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, shown
from data_pipelines.formats.turns import text_of
from data_pipelines.rows import JsonLinesReader, RowError
from data_pipelines.samples import Image, Message, Sample, Text

PERMUTATIONS = 6
PROMPT = "{sentence}\nIs this true or false?"
KEYS = ("sentence", "label", "identifier", "directory")


@DATASET_FORMATS.register("nlvr")
class NLVR(Format):
    """NLVR 1.0 in its official layout: a sentence, and images of boxes for which it is true or false."""

    def dependencies(self, files: list[Path], media: Path) -> list[Path]:
        return [*files, *sorted((media / "images").glob("*"))]  # adding or removing an image changes its folder

    def reader(self, files: list[Path], media: Path, folder: Path) -> JsonLinesReader:
        return PermutationReader(files, folder, media)

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return row.keys() >= {*KEYS}

    def parse(self, row: Any, place: Place) -> Sample:
        if not isinstance(row, dict):
            raise RowError(f"expected an object, not {type(row).__name__}")
        if reason := _problem(row):
            raise RowError(reason)
        image = _image_path(Path(place.source), Path(place.root), row, row["permutation"])
        if row["permutation"] < 0:
            raise RowError(f"none of its images exists: {shown(str(image), 250)} …")
        question = Message("user", (Image(image), Text(PROMPT.format(sentence=text_of(row, "sentence").strip()))))
        answer = Message("assistant", (Text(row["label"].lower()),))
        return place.sample((question, answer), f"directory {row['directory']}")


class PermutationReader(JsonLinesReader):
    """Reads one row per existing image, or one with permutation -1 if there is none."""

    def __init__(self, files: list[Path], folder: Path, media: Path):
        super().__init__(files, folder)
        self.media = media

    def scan(self) -> Iterator[Any]:
        permutations = array("b")
        for row in super().scan():
            permutations.append(row["permutation"] if isinstance(row, dict) else -1)
            yield row
        self.arrays["permutation"] = np.array(permutations, np.int8)

    def read(self, number: int) -> Any:
        return self._with_permutation(super().read(number), int(self.arrays["permutation"][number]))

    def _iterate(self) -> Iterator[tuple[int, int, Any]]:
        for begin, end, row in super()._iterate():
            if not isinstance(row, dict):
                yield begin, end, row
                continue
            numbers = range(0 if _problem(row) else PERMUTATIONS)
            existing = [k for k in numbers if _image_path(self.files[0], self.media, row, k).is_file()]
            for k in existing or [-1]:
                yield begin, end, self._with_permutation(row, k)

    def _with_permutation(self, row: dict[str, Any], permutation: int) -> dict[str, Any]:
        name = row.get("identifier")
        if permutation >= 0:
            name = _image_path(self.files[0], self.media, row, permutation).name
        return row | {"permutation": permutation, "id": name}


def _problem(row: dict[str, Any]) -> str | None:
    for key in KEYS:
        if not isinstance(row.get(key), str):
            return f"{key!r} must be a string, not {shown(row.get(key))}"
    if row["label"].lower() not in ("true", "false"):
        return f"'label' must be true or false, not {shown(row['label'])}"
    if not row["directory"].isdigit() or not row["identifier"].replace("-", "").isdigit():
        values = f"{shown(row['directory'])} and {shown(row['identifier'])}"
        return f"'directory' and 'identifier' must be numbers, not {values}"
    return None


def _image_path(path: Path, media: Path, row: dict[str, Any], permutation: int) -> Path:
    return media / "images" / row["directory"] / f"{path.stem}-{row['identifier']}-{max(permutation, 0)}.png"
