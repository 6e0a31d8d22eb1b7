"""Captions of pictures: `caption` over any dataset format, `coco_caption` and `flickr30k`; and what scores every
captioning benchmark.

Scorer: tylin/coco-caption, pycocoevalcap/eval.py, as its Python 3 package pycocoevalcap 1.2 has it: the PTB tokenizer,
then BLEU, METEOR, ROUGE-L and CIDEr over the whole set. The headline is CIDEr × 100; its document frequencies are those
of the references asked about, so that a part of a benchmark (`limit`) is scored otherwise than the whole.

The prompt is the one that LLaVA-1.5 was trained on captions with (Liu et al., arXiv 2310.03744, table 7).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.samples import Image
from eval.archives import write_zip
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.own_data import OwnData
from eval.captions import bleu, cider, rouge_l
from eval.captions_java import Meteor, check_installed, meteor_process, tokenize
from eval.files import json_text
from eval.layout import fields, find_file, find_folder, read_answers_as, read_json, read_lines
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

Tokenized = tuple[list[list[str]], list[str]]  # every image's references, and what was said of it


class CaptionBenchmark(Benchmark):
    """Captions against several references (tylin/coco-caption, pycocoevalcap/eval.py)."""

    prompt = "Provide a one-sentence caption for the provided image."
    max_new_tokens = 64
    has_strict = False
    bounds = None  # CIDEr has no most

    def as_scored(self, caption: str) -> str:
        """The caption as the official script hands it to the tokenizer."""
        return caption

    def score(self, response: str, question: Question) -> Score:
        """0: CIDEr weighs words by how many images' captions have them, and of a single image all have."""
        return Score(0.0, 0.0)

    def score_all(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Score]:
        values = cider(*self.tokenized(responses, questions))
        return {q.id: Score(value, value) for q, value in zip(questions, values, strict=True)}

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        with meteor_process() as meteor:
            found = corpus_metrics(self.tokenized(responses, questions), meteor)
        return {name: 100 * value for name, value in found.items()}

    def tokenized(self, responses: Mapping[str, str], questions: Sequence[Question]) -> Tokenized:
        golds = tuple(tuple(self.as_scored(reference) for reference in q.references) for q in questions)
        return tokenize_all(golds, tuple(self.as_scored(responses[q.id]) for q in questions))

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """COCO's results, [{"image_id", "caption"}], or ours."""
        return read_answers_as(path, ("image_id", "caption"), ("id", "response"))[0]


@lru_cache(maxsize=1)  # a report's scores and its further metrics are of the same captions
def tokenize_all(references: tuple[tuple[str, ...], ...], captions: tuple[str, ...]) -> Tokenized:
    """All references at once and then all captions, as the official script does."""
    flat = iter(tokenize([reference for golds in references for reference in golds]))
    return [[next(flat) for _ in golds] for golds in references], tokenize(captions)


def corpus_metrics(tokenized: Tokenized, meteor: Meteor) -> dict[str, float]:
    """The official figures over the whole set by their official names, 0 to 1 (CIDEr: 0 to 10)."""
    figures = {f"Bleu_{n}": value for n, value in enumerate(bleu(*tokenized)[0], 1)}
    figures["METEOR"] = meteor.score(*tokenized)[0]
    figures["ROUGE_L"] = float(np.mean(rouge_l(*tokenized)))
    return figures | {"CIDEr": float(np.mean(cider(*tokenized)))}


def scorable(questions: list[Question]) -> list[Question]:
    """The questions as they are. Raises UserError where what scores them is not installed: better now than after hours
    of generation."""
    if any(q.references for q in questions):
        check_installed()
    return questions


def checked_caption(caption: Any, file: Path, where: str) -> str:
    if not isinstance(caption, str):
        raise UserError(f"{file}, {where}: the caption is {caption!r:.60}, not text")
    return caption


def image_question(question_id: str, text: str, path: Path, references: Sequence[str], **details: Any) -> Question:
    sample = conversation(question_id, text, [Image(path)])
    return Question(question_id, sample, tuple(references), question_id, details=details)


@BENCHMARKS.register("caption")
class Caption(OwnData, CaptionBenchmark):
    """Captions over any dataset format, by CIDEr (tylin/coco-caption, pycocoevalcap/eval.py)."""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        return scorable(super().questions(config))


@BENCHMARKS.register("coco_caption")
class CocoCaption(CaptionBenchmark):
    """COCO captions by CIDEr, Karpathy's splits or the official ones (tylin/coco-caption, pycocoevalcap/eval.py)."""

    layout = """<data>/dataset_coco.json  (splits test and val: Karpathy's caption_datasets.zip)
<data>/annotations/captions_val2014.json  (split val2014)
<data>/annotations/image_info_test2014.json  (split test2014, for the leaderboard)
<data>/val2014/COCO_val2014_000000000042.jpg, <data>/test2014/COCO_test2014_000000000001.jpg"""
    splits = ("test", "val", "val2014", "test2014")

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        folder = "test2014" if split == "test2014" else "val2014"
        pictures = find_folder(config.data, [folder, f"images/{folder}"], config.media, self.layout)
        names = {
            "val2014": ["annotations/captions_val2014.json", "captions_val2014.json"],
            "test2014": ["annotations/image_info_test2014.json", "image_info_test2014.json"],
        }
        file = find_file(config.data, names.get(split, ["dataset_coco.json", "*/dataset_coco.json"]), self.layout)
        data, text = read_json(file), self.ask(config)
        if isinstance(data, dict) and "dataset" in data:
            rows = karpathy_split(data, file, split, "cocoid")
        else:
            rows = coco_captions(data, file)
        asked = [
            image_question(str(image_id), text, pictures / name, captions, split=split)
            for image_id, name, captions in rows
        ]
        return scorable(asked)

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """A zip of captions_val2014_<alg>_results.json and captions_test2014_<alg>_results.json, `out` being
        <alg>.zip."""
        found = {result.rows[0]["details"].get("split"): result for result in results}
        if len(results) != 2 or found.keys() != {"val2014", "test2014"}:
            given = ", ".join(str(result.rows[0]["details"].get("split")) for result in results)
            raise UserError(f"the leaderboard wants two results, of the splits val2014 and test2014, not {given}")
        files = {}
        for split, result in found.items():
            rows = [{"image_id": _coco_id(result, row), "caption": row["response"]} for row in result.rows]
            files[f"captions_{split}_{out.stem}_results.json"] = json_text(rows)
        write_zip(out, files)


def _coco_id(result: Result, row: Mapping[str, Any]) -> int:
    if not row["id"].isdecimal():
        raise UserError(f"{result.folder}: {row['id']!r} is no id of a COCO image")
    if not row["response"].strip():
        raise UserError(f"{result.folder}: image {row['id']} has no caption")
    return int(row["id"])


def coco_captions(data: Any, file: Path) -> list[tuple[int, str, list[str]]]:
    """(id, file name, captions) of each image of a COCO annotations file; without captions where it has none at all."""
    images, annotations = fields({"annotations": []} | _object(data, file), file, "the file", "images", "annotations")
    captions: dict[int, list[str]] = defaultdict(list)
    for number, row in enumerate(annotations):
        image_id, caption = fields(row, file, f"annotation {number}", "image_id", "caption")
        captions[image_id].append(checked_caption(caption, file, f"annotation {number}"))
    rows = []
    for number, row in enumerate(images):
        (image_id,) = fields(row, file, f"image {number}", "id")
        if not isinstance(image_id, int):
            raise UserError(f"{file}, image {number}: its id is {image_id!r}, not a whole number")
        if annotations and image_id not in captions:
            raise UserError(f"{file}: image {image_id} has no caption")
        # BLIP's files of Karpathy's splits in this form name no pictures.
        rows.append((image_id, row.get("file_name", f"COCO_val2014_{image_id:012}.jpg"), captions[image_id]))
    return rows


def karpathy_split(data: Any, file: Path, split: str, key: str) -> list[tuple[Any, str, list[str]]]:
    """(id, file name, captions) of each image of a split of Karpathy's files; `key` is the id's field."""
    (images,) = fields(data, file, "the file", "images")
    rows = []
    for number, row in enumerate(images):
        where = f"image {number}"
        image_id, name, sentences, its_split = fields(row, file, where, key, "filename", "sentences", "split")
        if its_split == split:
            said = [checked_caption(next(fields(s, file, where, "raw")), file, where) for s in sentences]
            rows.append((image_id, name, said))
    return rows


def _object(data: Any, file: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected an object, found {type(data).__name__}")
    return data


@BENCHMARKS.register("flickr30k")
class Flickr30k(CaptionBenchmark):
    """Flickr30k captions by CIDEr, Karpathy's test split (tylin/coco-caption, pycocoevalcap/eval.py)."""

    layout = """<data>/dataset_flickr30k.json  (splits test and val: Karpathy's caption_datasets.zip)
  or <data>/results_20130124.token  (every image of it is asked about)
<data>/flickr30k-images/1007129816.jpg"""
    splits = ("test", "val")

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        names = ["dataset_flickr30k.json", "*/dataset_flickr30k.json", "results_20130124.token"]
        file = find_file(config.data, names, self.layout)
        pictures = find_folder(config.data, ["flickr30k-images", "flickr30k_images"], config.media, self.layout)
        if file.suffix == ".json":
            rows = karpathy_split(read_json(file), file, split, "filename")
        else:
            rows = [(name, name, captions) for name, captions in token_file(file).items()]
        text = self.ask(config)
        asked = [image_question(name.removesuffix(".jpg"), text, pictures / name, found) for _, name, found in rows]
        return scorable(asked)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """As COCO's, an image named with or without its ".jpg"."""
        found = super().read_predictions(path, questions)
        return [(name.removesuffix(".jpg"), caption) for name, caption in found]


def token_file(file: Path) -> dict[str, list[str]]:
    """Captions by the image's file name, of lines such as "36979.jpg#0<tab>A group of friends …"."""
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(read_lines(file), 1):
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise UserError(f"{file}, line {number}: expected <image>#<number>, a tab and a caption")
        captions[name.rpartition("#")[0]].append(caption.rstrip("\r"))
    return captions
