"""`pope`: POPE (Li et al., EMNLP 2023): is an object in the picture that may not be there?

Scorer: RUCAIBox/POPE, evaluate.py, and haotian-liu/LLaVA, llava/eval/eval_pope.py, which is the same for each category
(random, popular, adversarial). Of an answer's first sentence, without commas, the words "No", "no" and "not" mean no;
everything else means yes, "NO", "None" and silence too. The headline is the mean of the categories' F1 scores, as
LLaVA-1.5 reports it. Where the official code stops at a division by zero, as without any "yes", there is no figure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.files import json_text, write_whole
from eval.layout import find_file, find_folder, read_rows, typed_fields, warn_of_missing
from eval.metrics import Table, Totals
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

CATEGORIES = ("adversarial", "popular", "random")  # LLaVA's order
NEGATIONS = {"No", "not", "no"}
CELLS = ("tp", "fp", "tn", "fn")
FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def parse(response: str) -> str:
    """The official reading, yes or no."""
    words = response.partition(".")[0].replace(",", "").split(" ")
    return "yes" if NEGATIONS.isdisjoint(words) else "no"


def clearly(response: str) -> str | None:
    """Yes or no by the first word, or by the only one of the two that is said; None where neither is."""
    words = re.findall(r"[a-z]+", response.lower())
    said = {"yes": "yes" in words, "no": not {"no", "not"}.isdisjoint(words) or "n't" in response.lower()}
    if words and words[0] in said:
        return words[0]
    return next((word for word in said if said[word]), None) if said["yes"] != said["no"] else None


def figures(tp: np.ndarray, fp: np.ndarray, tn: np.ndarray, fn: np.ndarray) -> dict[str, np.ndarray]:
    """The official figures, 0 to 1; NaN where the official code divides by zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        n = tp + fp + tn + fn
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        f1 = 2 * precision * recall / (precision + recall)
        return dict(zip(FIGURES, ((tp + tn) / n, precision, recall, f1, (tp + fp) / n), strict=True))


@BENCHMARKS.register("pope")
class POPE(Benchmark):
    """POPE, mean F1 of its three categories (RUCAIBox/POPE, evaluate.py; LLaVA, eval_pope.py)."""

    layout = "<folder>/coco/coco_pope_<category>.json (or .jsonl) for random, popular and adversarial; <folder>/val2014"

    def questions(self, config: EvaluationConfig) -> list[Question]:
        return [q for category, path in self._files(config) for q in self._asked(category, path, config)]

    def _files(self, config: EvaluationConfig) -> Iterator[tuple[str, Path]]:
        """Categories with their files. Raises UserError where there is none."""
        root = find_path(config.data)
        if root.is_file():
            named = [category for category in CATEGORIES if category in root.name]
            if len(named) != 1:
                what = "the name does not say which category it holds"
                raise UserError(f"{root}: {what}; expected layout:\n{self.layout}")
            yield named[0], root
            return
        places = {c: [f"{place}*_pope_{c}.json*" for place in ("", "coco/", "output/coco/")] for c in CATEGORIES}
        found = [c for c in CATEGORIES if any(next(root.glob(place), None) for place in places[c])]
        absent = [f"coco_pope_{c}.json" for c in CATEGORIES if found and c not in found]
        warn_of_missing(config.data, absent, self.layout)
        for category in found or CATEGORIES:  # of none at all, `find_file` says what is expected
            yield category, find_file(config.data, places[category], self.layout)

    def _asked(self, category: str, path: Path, config: EvaluationConfig) -> Iterator[Question]:
        images = find_folder(config.data, ["val2014", "coco/val2014", "images"], config.media, self.layout)
        for number, row in enumerate(read_rows(path), 1):
            where = f"line {number}"
            asked, image, text, label = typed_fields(
                row, path, where, question_id=int | str, image=str, text=str, label=str
            )
            if label not in ("yes", "no"):
                raise UserError(f"{path}, line {number}: the label is {label!r}, not yes or no")
            words = self.ask(config, question=text)
            sample = conversation(f"{category}/{asked}", words, [Image(images / image)], str(path))
            details = {"category": category, "question_id": asked, "question": text}
            yield Question(sample.id, sample, (label,), image, (category,), details)

    def score(self, response: str, question: Question) -> Score:
        """Strict is what is right by the official reading and was clearly said."""
        label, category = question.references[0], question.details["category"]
        said, clear = parse(response), clearly(response)
        right = said == label
        surely = right and clear == said
        counts: dict[str, float] = {}
        for kind, correct in (("official", right), ("strict", surely)):
            cell = ("t" if correct else "f") + ("p" if correct == (label == "yes") else "n")
            counts |= {f"{category} {kind} {name}": float(name == cell) for name in CELLS}
        return Score(float(right), float(surely), clear is None, counts)

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """The mean of the categories' F1 scores in percent."""
        return 100 * np.mean([found["f1"] for found in by_category(totals, kind).values()], axis=0)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        scores = [self.score(responses[q.id], q) for q in questions]
        names = sorted({name for score in scores for name in score.counts})
        columns = {name: [score.counts.get(name, 0.0) for score in scores] for name in names}
        found = by_category(Table(columns, [q.cluster for q in questions]).whole(), "official")
        metrics: dict[str, Any] = {
            category: {name: None if np.isnan(value[0]) else float(value[0]) for name, value in values.items()}
            for category, values in found.items()
        }
        return metrics | {"categories": f"{len(found)} of {len(CATEGORIES)}"}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """evaluate.py's answers (JSON lines of `question` and `answer`, in the questions' order: a file, or a folder
        with a file for each category), or LLaVA's, of all categories in its order (`question_id`, `prompt`, `text`)."""
        if path.is_dir():
            pairs = []
            for category in dict.fromkeys(q.details["category"] for q in questions):
                file = find_file(str(path), [f"*{category}*.json*"], f"{path}/<…{category}…>.json for each category")
                pairs += _answers(file, [q for q in questions if q.details["category"] == category])
            return pairs
        rows = read_rows(path)
        if rows and isinstance(rows[0], dict) and {"id", "response"} <= rows[0].keys():
            return super().read_predictions(path, questions)
        return _answers(path, questions)

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """evaluate.py's answers, JSON lines of `question` and `answer`, with the category and the question's id."""
        rows = self.only_result(results).rows
        write_whole(out, "".join(json_text({**row["details"], "answer": row["response"]}) for row in rows))


def by_category(totals: Totals, kind: str) -> dict[str, dict[str, np.ndarray]]:
    """The official figures of each category that there is."""
    present = [category for category in CATEGORIES if f"{category} {kind} tp" in totals]
    return {category: figures(*(totals[f"{category} {kind} {cell}"] for cell in CELLS)) for category in present}


def _answers(path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
    """By id, where every row has the id and category of a question; otherwise in the questions' order.

    Raises UserError where the number of answers is another, or one names another question.
    """
    rows = read_rows(path)
    key = "answer" if rows and isinstance(rows[0], dict) and "answer" in rows[0] else "text"
    said = [next(typed_fields(row, path, f"row {number}", **{key: str})) for number, row in enumerate(rows, 1)]
    categories = {q.details["category"] for q in questions}
    only = next(iter(categories)) if len(categories) == 1 else None
    ids = [f"{row.get('category', only)}/{row.get('question_id')}" for row in rows]
    by_id = {q.id: q for q in questions}
    if not by_id.keys() >= set(ids):
        if len(rows) != len(questions):
            raise UserError(
                f"{path}: {len(rows)} answers to {len(questions)} questions; their order is that of the questions"
            )
        ids = [q.id for q in questions]
    for number, (i, row) in enumerate(zip(ids, rows, strict=True), 1):
        asked, expected = str(row.get("question", row.get("prompt", ""))), by_id[i].details["question"]
        if asked and not asked.lower().startswith(expected.lower()):
            raise UserError(f"{path}, row {number}: answers {asked!r:.80}, and the question is {expected!r}")
    return list(zip(ids, said, strict=True))
