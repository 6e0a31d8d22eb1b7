"""Image captioning: COCO, Flickr30k and your own data, and the scorer that all captioning benchmarks share.

Data: Karpathy's splits or the official annotations, beside the images; `caption` reads any dataset format.

Prompt: the one that LLaVA-1.5 was trained with for captions (Liu et al., arXiv 2310.03744, table 7).

Scorer: tylin/coco-caption, pycocoevalcap/eval.py, as in its Python 3 package pycocoevalcap 1.2: the PTB tokenizer, then
BLEU, METEOR, ROUGE-L and CIDEr over the whole set. The headline is CIDEr × 100. CIDEr's document frequencies come from
the references of the evaluated images, so the CIDEr of a subset (`limit`) does not compare with that of the whole set.
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

Tokenized = tuple[list[list[str]], list[str]]  # the references and the predicted caption of every image


class CaptionBenchmark(Benchmark):
    """Captions scored by CIDEr against several references (tylin/coco-caption, pycocoevalcap/eval.py)."""

    prompt = "Provide a one-sentence caption for the provided image."
    max_new_tokens = 64
    has_strict = False
    bounds = None  # CIDEr has no fixed maximum

    def preprocess(self, caption: str) -> str:
        """Return the caption as the official script passes it to the tokenizer."""
        return caption

    def score(self, response: str, question: Question) -> Score:
        """Return 0: CIDEr weighs words by how few images have them in a caption, which needs several images."""
        return Score(0.0, 0.0)

    def score_all(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Score]:
        values = cider(*self.tokenized(responses, questions))
        return {q.id: Score(value, value) for q, value in zip(questions, values, strict=True)}

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        with meteor_process() as meteor:
            metrics = corpus_metrics(self.tokenized(responses, questions), meteor)
        return {name: 100 * value for name, value in metrics.items()}

    def tokenized(self, responses: Mapping[str, str], questions: Sequence[Question]) -> Tokenized:
        references = tuple(tuple(self.preprocess(reference) for reference in q.references) for q in questions)
        return tokenize_all(references, tuple(self.preprocess(responses[q.id]) for q in questions))

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read COCO's results, `[{"image_id", "caption"}]`, or mmdora's responses.jsonl."""
        return read_answers_as(path, ("image_id", "caption"), ("id", "response"))[0]


@lru_cache(maxsize=1)  # `score_all` and `extras` tokenize the same captions
def tokenize_all(references: tuple[tuple[str, ...], ...], captions: tuple[str, ...]) -> Tokenized:
    """Tokenize all references in one call, then all captions in another, as the official script does."""
    flat = iter(tokenize([reference for group in references for reference in group]))
    return [[next(flat) for _ in group] for group in references], tokenize(captions)


def corpus_metrics(tokenized: Tokenized, meteor: Meteor) -> dict[str, float]:
    """Return the official metrics over the whole set by their official names, 0 to 1 (CIDEr: 0 to 10)."""
    figures = {f"Bleu_{n}": value for n, value in enumerate(bleu(*tokenized)[0], 1)}
    figures["METEOR"] = meteor.score(*tokenized)[0]
    figures["ROUGE_L"] = float(np.mean(rouge_l(*tokenized)))
    return figures | {"CIDEr": float(np.mean(cider(*tokenized)))}


def require_scorer(questions: list[Question]) -> list[Question]:
    """Return the questions unchanged. Raise UserError before generation if the scorer's packages are not installed."""
    if any(q.references for q in questions):
        check_installed()
    return questions


def checked_caption(caption: Any, file: Path, where: str) -> str:
    if not isinstance(caption, str):
        raise UserError(f"{file}, {where}: the caption must be a string, found {caption!r:.60}")
    return caption


def image_question(question_id: str, text: str, path: Path, references: Sequence[str], **details: Any) -> Question:
    sample = conversation(question_id, text, [Image(path)])
    return Question(question_id, sample, tuple(references), question_id, details=details)


@BENCHMARKS.register("caption")
class Caption(OwnData, CaptionBenchmark):
    """Captioning: CIDEr on your own data in any dataset format (tylin/coco-caption, pycocoevalcap/eval.py)."""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        return require_scorer(super().questions(config))


@BENCHMARKS.register("coco_caption")
class CocoCaption(CaptionBenchmark):
    """COCO captions: CIDEr on Karpathy's or the official splits (tylin/coco-caption, pycocoevalcap/eval.py)."""

    layout = """<data>/dataset_coco.json  (splits test and val: Karpathy's caption_datasets.zip)
<data>/annotations/captions_val2014.json  (split val2014)
<data>/annotations/image_info_test2014.json  (split test2014, for the leaderboard)
<data>/val2014/COCO_val2014_000000000042.jpg, <data>/test2014/COCO_test2014_000000000001.jpg"""
    splits = ("test", "val", "val2014", "test2014")

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        folder = "test2014" if split == "test2014" else "val2014"
        images_folder = find_folder(config.data, [folder, f"images/{folder}"], config.media, self.layout)
        names = {
            "val2014": ["annotations/captions_val2014.json", "captions_val2014.json"],
            "test2014": ["annotations/image_info_test2014.json", "image_info_test2014.json"],
        }
        file = find_file(config.data, names.get(split, ["dataset_coco.json", "*/dataset_coco.json"]), self.layout)
        data, text = read_json(file), self.format_prompt(config)
        if isinstance(data, dict) and "dataset" in data:
            rows = karpathy_split(data, file, split, "cocoid")
        else:
            rows = coco_captions(data, file)
        questions = [
            image_question(str(image_id), text, images_folder / name, captions, split=split)
            for image_id, name, captions in rows
        ]
        return require_scorer(questions)

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write <alg>.zip with captions_val2014_<alg>_results.json and captions_test2014_<alg>_results.json."""
        by_split = {result.rows[0]["details"].get("split"): result for result in results}
        if len(results) != 2 or by_split.keys() != {"val2014", "test2014"}:
            given = ", ".join(str(result.rows[0]["details"].get("split")) for result in results)
            raise UserError(f"the leaderboard takes two results, of the splits val2014 and test2014; got {given}")
        files = {}
        for split, result in by_split.items():
            rows = [{"image_id": _coco_id(result, row), "caption": row["response"]} for row in result.rows]
            files[f"captions_{split}_{out.stem}_results.json"] = json_text(rows)
        write_zip(out, files)


def _coco_id(result: Result, row: Mapping[str, Any]) -> int:
    if not row["id"].isdecimal():
        raise UserError(f"{result.folder}: {row['id']!r} is not the id of a COCO image")
    if not row["response"].strip():
        raise UserError(f"{result.folder}: image {row['id']} has no caption")
    return int(row["id"])


def coco_captions(data: Any, file: Path) -> list[tuple[int, str, list[str]]]:
    """Return (id, file name, captions) per image of a COCO annotations file; no captions if the file has none."""
    images, annotations = fields({"annotations": []} | _object(data, file), file, "the file", "images", "annotations")
    captions: dict[int, list[str]] = defaultdict(list)
    for number, row in enumerate(annotations):
        image_id, caption = fields(row, file, f"annotation {number}", "image_id", "caption")
        captions[image_id].append(checked_caption(caption, file, f"annotation {number}"))
    rows = []
    for number, row in enumerate(images):
        (image_id,) = fields(row, file, f"image {number}", "id")
        if not isinstance(image_id, int):
            raise UserError(f"{file}, image {number}: the id must be an integer, found {image_id!r}")
        if annotations and image_id not in captions:
            raise UserError(f"{file}: image {image_id} has no caption")
        # BLIP's files of Karpathy's splits have this form, without file names.
        rows.append((image_id, row.get("file_name", f"COCO_val2014_{image_id:012}.jpg"), captions[image_id]))
    return rows


def karpathy_split(data: Any, file: Path, split: str, key: str) -> list[tuple[Any, str, list[str]]]:
    """Return (id, file name, captions) per image of a split of Karpathy's files; `key` is the field of the id."""
    (images,) = fields(data, file, "the file", "images")
    rows = []
    for number, row in enumerate(images):
        where = f"image {number}"
        image_id, name, sentences, split_of_image = fields(row, file, where, key, "filename", "sentences", "split")
        if split_of_image == split:
            captions = [checked_caption(next(fields(s, file, where, "raw")), file, where) for s in sentences]
            rows.append((image_id, name, captions))
    return rows


def _object(data: Any, file: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected an object, found {type(data).__name__}")
    return data


@BENCHMARKS.register("flickr30k")
class Flickr30k(CaptionBenchmark):
    """Flickr30k: CIDEr of captions, Karpathy's splits (tylin/coco-caption, pycocoevalcap/eval.py)."""

    layout = """<data>/dataset_flickr30k.json  (splits test and val: Karpathy's caption_datasets.zip)
  or <data>/results_20130124.token  (all of its images)
<data>/flickr30k-images/1007129816.jpg"""
    splits = ("test", "val")

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        names = ["dataset_flickr30k.json", "*/dataset_flickr30k.json", "results_20130124.token"]
        file = find_file(config.data, names, self.layout)
        images_folder = find_folder(config.data, ["flickr30k-images", "flickr30k_images"], config.media, self.layout)
        if file.suffix == ".json":
            rows = karpathy_split(read_json(file), file, split, "filename")
        else:
            rows = [(name, name, captions) for name, captions in token_file(file).items()]
        text = self.format_prompt(config)
        questions = [
            image_question(name.removesuffix(".jpg"), text, images_folder / name, captions)
            for _, name, captions in rows
        ]
        return require_scorer(questions)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the same files as for COCO; image names may omit ".jpg"."""
        pairs = super().read_predictions(path, questions)
        return [(name.removesuffix(".jpg"), caption) for name, caption in pairs]


def token_file(file: Path) -> dict[str, list[str]]:
    """Return captions by image file name, from lines such as "36979.jpg#0<tab>A group of friends …"."""
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(read_lines(file), 1):
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise UserError(f"{file}, line {number}: expected <image>#<number>, a tab and a caption")
        captions[name.rpartition("#")[0]].append(caption.rstrip("\r"))
    return captions
