"""POPE (Li et al., EMNLP 2023): yes/no questions about objects that may or may not be in a COCO image.

Data: one JSON-lines file per category (random, popular, adversarial), and COCO's val2014 images.

Scorer: RUCAIBox/POPE, evaluate.py, and haotian-liu/LLaVA, llava/eval/eval_pope.py, which agree on each category. In the
first sentence of a response, without commas, the words "No", "no" and "not" mean no. Quirk reproduced: everything else
means yes, including "NO", "None" and an empty response. The headline is the mean of the categories' F1 scores, as
LLaVA-1.5 reports it. A figure is missing if the official code divides by zero, for example without any "yes".
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
    """Read a response as "yes" or "no", as the official code does."""
    words = response.partition(".")[0].replace(",", "").split(" ")
    return "yes" if NEGATIONS.isdisjoint(words) else "no"


def parse_strictly(response: str) -> str | None:
    """Return "yes" or "no" if it is the first word or the only one of both in the response, else None."""
    words = re.findall(r"[a-z]+", response.lower())
    mentioned = {"yes": "yes" in words, "no": not {"no", "not"}.isdisjoint(words) or "n't" in response.lower()}
    if words and words[0] in mentioned:
        return words[0]
    return next((word for word in mentioned if mentioned[word]), None) if mentioned["yes"] != mentioned["no"] else None


def figures(tp: np.ndarray, fp: np.ndarray, tn: np.ndarray, fn: np.ndarray) -> dict[str, np.ndarray]:
    """Return the official figures, 0 to 1; NaN if the official code divides by zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        n = tp + fp + tn + fn
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        f1 = 2 * precision * recall / (precision + recall)
        return dict(zip(FIGURES, ((tp + tn) / n, precision, recall, f1, (tp + fp) / n), strict=True))


@BENCHMARKS.register("pope")
class POPE(Benchmark):
    """POPE: mean F1 score of its three categories (RUCAIBox/POPE, evaluate.py; LLaVA, eval_pope.py)."""

    layout = "<folder>/coco/coco_pope_<category>.json (or .jsonl) for random, popular and adversarial; <folder>/val2014"

    def questions(self, config: EvaluationConfig) -> list[Question]:
        return [q for category, path in self._files(config) for q in self._questions(category, path, config)]

    def _files(self, config: EvaluationConfig) -> Iterator[tuple[str, Path]]:
        """Yield each category with its file. Raise UserError if there is none."""
        root = find_path(config.data)
        if root.is_file():
            named = [category for category in CATEGORIES if category in root.name]
            if len(named) != 1:
                problem = f"the file name must contain one of {', '.join(CATEGORIES)}"
                raise UserError(f"{root}: {problem}; expected layout:\n{self.layout}")
            yield named[0], root
            return
        places = {c: [f"{place}*_pope_{c}.json*" for place in ("", "coco/", "output/coco/")] for c in CATEGORIES}
        present = [c for c in CATEGORIES if any(next(root.glob(place), None) for place in places[c])]
        absent = [f"coco_pope_{c}.json" for c in CATEGORIES if present and c not in present]
        warn_of_missing(config.data, absent, self.layout)
        for category in present or CATEGORIES:  # without any file, `find_file` reports the expected layout
            yield category, find_file(config.data, places[category], self.layout)

    def _questions(self, category: str, path: Path, config: EvaluationConfig) -> Iterator[Question]:
        images = find_folder(config.data, ["val2014", "coco/val2014", "images"], config.media, self.layout)
        for number, row in enumerate(read_rows(path), 1):
            where = f"line {number}"
            question_id, image, text, label = typed_fields(
                row, path, where, question_id=int | str, image=str, text=str, label=str
            )
            if label not in ("yes", "no"):
                raise UserError(f"{path}, line {number}: the label is {label!r}, not yes or no")
            prompt = self.format_prompt(config, question=text)
            sample = conversation(f"{category}/{question_id}", prompt, [Image(images / image)], str(path))
            details = {"category": category, "question_id": question_id, "question": text}
            yield Question(sample.id, sample, (label,), image, (category,), details)

    def score(self, response: str, question: Question) -> Score:
        """Score a response; `strict` also requires that `parse_strictly` reads the same answer."""
        label, category = question.references[0], question.details["category"]
        predicted, strictly_parsed = parse(response), parse_strictly(response)
        correct = predicted == label
        strictly_correct = correct and strictly_parsed == predicted
        counts: dict[str, float] = {}
        for kind, is_correct in (("official", correct), ("strict", strictly_correct)):
            cell = ("t" if is_correct else "f") + ("p" if is_correct == (label == "yes") else "n")
            counts |= {f"{category} {kind} {name}": float(name == cell) for name in CELLS}
        return Score(float(correct), float(strictly_correct), strictly_parsed is None, counts)

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """Return the mean of the categories' F1 scores in percent."""
        return 100 * np.mean([figure["f1"] for figure in by_category(totals, kind).values()], axis=0)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        scores = [self.score(responses[q.id], q) for q in questions]
        names = sorted({name for score in scores for name in score.counts})
        columns = {name: [score.counts.get(name, 0.0) for score in scores] for name in names}
        by_name = by_category(Table(columns, [q.cluster for q in questions]).whole(), "official")
        metrics: dict[str, Any] = {
            category: {name: None if np.isnan(value[0]) else float(value[0]) for name, value in values.items()}
            for category, values in by_name.items()
        }
        return metrics | {"categories": f"{len(by_name)} of {len(CATEGORIES)}"}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the answers of evaluate.py or LLaVA, both JSON lines in the order of the questions.

        evaluate.py's lines hold `question` and `answer`, in one file or a folder with one file per category. LLaVA's
        hold `question_id`, `prompt` and `text`, for all categories in its order.
        """
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
        """Write evaluate.py's answers: JSON lines of `question` and `answer`, with the category and the question id."""
        rows = self.single_result(results).rows
        write_whole(out, "".join(json_text({**row["details"], "answer": row["response"]}) for row in rows))


def by_category(totals: Totals, kind: str) -> dict[str, dict[str, np.ndarray]]:
    """Return the official figures of each category present."""
    present = [category for category in CATEGORIES if f"{category} {kind} tp" in totals]
    return {category: figures(*(totals[f"{category} {kind} {cell}"] for cell in CELLS)) for category in present}


def _answers(path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
    """Match answers by id if every row has a question's id and category, otherwise by order.

    Raises:
        UserError: the number of answers differs from the number of questions, or a row names another question.
    """
    rows = read_rows(path)
    key = "answer" if rows and isinstance(rows[0], dict) and "answer" in rows[0] else "text"
    answers = [next(typed_fields(row, path, f"row {number}", **{key: str})) for number, row in enumerate(rows, 1)]
    categories = {q.details["category"] for q in questions}
    only = next(iter(categories)) if len(categories) == 1 else None
    ids = [f"{row.get('category', only)}/{row.get('question_id')}" for row in rows]
    by_id = {q.id: q for q in questions}
    if not by_id.keys() >= set(ids):
        if len(rows) != len(questions):
            raise UserError(
                f"{path}: {len(rows)} answers for {len(questions)} questions; expected one per question, in order"
            )
        ids = [q.id for q in questions]
    for number, (i, row) in enumerate(zip(ids, rows, strict=True), 1):
        answered, expected = str(row.get("question", row.get("prompt", ""))), by_id[i].details["question"]
        if answered and not answered.lower().startswith(expected.lower()):
            raise UserError(f"{path}, row {number}: answers {answered!r:.80}, but question {number} is {expected!r}")
    return list(zip(ids, answers, strict=True))
