"""GQA (Hudson and Manning, CVPR 2019): compositional questions about real images.

Data: one question file per split (an object of questions by id) beside the images. The file `<split>_choices.json` is
optional.

Scorer: eval.py of the dataset's eval.zip (cs.stanford.edu/people/dorarad/gqa/evaluate.html), with LLaVA's edits that
make choices and scene graphs optional (PKU-YuanGroup/Video-LLaVA, llava/eval/eval_gqa.py). A prediction is correct if
it equals the answer character by character. Accuracies cover the balanced questions; the splits that end in `_all` hold
others too, which only consistency uses. Consistency is how often the questions that a correct answer entails are
answered correctly as well. Validity and plausibility (is the answer a possible one?) need the choices file.
`distribution` is the chi-square distance between predicted and true answers; lower is better. Grounding, which uses
scene graphs and attention maps, is not computed.

A response is lower-cased and loses its final periods first, as in LLaVA's scripts/convert_gqa_for_eval.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.files import json_text, write_whole
from eval.layout import find_file, find_folder, read_answers_as, read_json, typed
from eval.metrics import Totals
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

NO_STEPS = ("exist", "query: name", "choose name")  # operations that do not count as reasoning steps
COMMON = ["color", "material", "shape"]  # choices for questions about what two objects have in common
SUBMISSION = "submission_all"


@BENCHMARKS.register("gqa")
class GQA(Benchmark):
    """GQA: accuracy over the balanced questions, and consistency (eval.py of the dataset's eval.zip)."""

    splits = (
        *(f"{tier}_{kind}" for kind in ("balanced", "all") for tier in ("testdev", "val", "test", "challenge")),
        "train_balanced",
        SUBMISSION,
    )
    layout = """questions1.2/testdev_balanced_questions.json   (also without questions1.2/, or all in data/)
images/n161313.jpg
testdev_balanced_choices.json   (optional, for validity and plausibility)"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        name = f"{split}_questions.json"
        path = find_file(config.data, [name, f"questions*/{name}", f"*/{name}", f"*/questions*/{name}"], self.layout)
        images = find_folder(str(path), ["images", "allImages/images"], config.media, self.layout)
        choices = choices_file(path, config.data)
        rows = read_json(path)
        if not isinstance(rows, dict):
            raise UserError(f"{path}: expected an object of questions by id")
        questions = []
        for question_id, row in rows.items():
            image_id, question_text = (
                typed(row, path, f"question {question_id}", key, str) for key in ("imageId", "question")
            )
            sample = conversation(
                question_id, self.format_prompt(config, question=question_text), [Image(images / f"{image_id}.jpg")]
            )
            if "answer" not in row:
                questions.append(Question(question_id, sample, (), image_id))
                continue
            answer, categories, details = annotation(row, path, f"question {question_id}")
            details |= {} if choices is None else {"choices": str(choices)}
            questions.append(Question(question_id, sample, (answer,), image_id, categories, details))
        return questions

    def prediction(self, response: str) -> str:
        return response.rstrip(".").lower()

    def score(self, response: str, question: Question) -> Score:
        score = Score.free_text(float(response == question.references[0]), response)
        counted = float(question.details["balanced"])
        counts = {"counted": counted, "counted_official": counted * score.official}
        return replace(score, counts=counts | {"counted_strict": counted * score.strict})

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        return 100 * totals[f"counted_{kind}"] / totals["counted"]

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        balanced = [q for q in questions if q.details["balanced"]]
        correct = {q.id: responses[q.id] == q.references[0] for q in questions}
        figures = {
            "consistency": consistency(balanced, correct),
            "distribution": distribution(balanced, responses),
            **acceptability(balanced, responses),
        }
        return {name: value for name, value in figures.items() if value is not None}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the official format, `[{"questionId", "prediction"}]`, LLaVA's answers or mmdora's responses.jsonl.

        LLaVA's answers are `{"question_id", "text"}`.
        """
        official = ("questionId", "prediction")
        pairs, form = read_answers_as(path, official, ("question_id", "text"), ("id", "response"))
        return pairs if form == official else [(i, self.prediction(response)) for i, response in pairs]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write EvalAI's file, `[{"questionId", "prediction"}]`, with every question of submission_all_questions.json.

        The server scores those of the phase.
        """
        result = self.single_result(results, f"the split {SUBMISSION}")
        split, data = result.receipt["split"], Path(result.receipt["data"])
        hidden = not result.rows[0]["references"]
        if hidden and split != SUBMISSION and data.name != f"{SUBMISSION}_questions.json":
            raise UserError(
                f"{result.folder}: the split is {split or data.name}, and the leaderboard takes {SUBMISSION}"
            )
        write_whole(out, json_text([{"questionId": row["id"], "prediction": row["response"]} for row in result.rows]))


def annotation(row: dict[str, Any], path: Path, where: str) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """Return the answer, the categories (balanced questions only), and the details that the other figures need."""
    types, groups = typed(row, path, where, "types", dict), typed(row, path, where, "groups", dict)
    balanced = typed(row, path, where, "isBalanced", bool)
    details: dict[str, Any] = {
        "balanced": balanced,
        "group": groups.get("global"),
        "common": "Common" in typed(types, path, where, "detailed", str),
        "entailed": [str(other) for other in typed(row, path, where, "entailed", list)],
    }
    steps = [
        f"{typed(step, path, where, 'operation', str)}: {typed(step, path, where, 'argument', str)}"
        for step in typed(row, path, where, "semantic", list)
    ]
    structural = typed(types, path, where, "structural", str)
    categories = (
        "kind: open" if structural == "query" else "kind: binary",
        f"structural: {structural}",
        f"semantic: {typed(types, path, where, 'semantic', str)}",
        f"steps: {sum(not any(name in step for name in NO_STEPS) for step in steps)}",
        f"words: {len(row['question'].split())}",
    )
    return typed(row, path, where, "answer", str), categories if balanced else (), details


def choices_file(questions: Path, data: str) -> Path | None:
    """Return the file of possible answers if there is one: `testdev_balanced_choices.json` or `val_choices.json`."""
    split = questions.stem.removesuffix("_questions")
    root = find_path(data)
    for folder in (root if root.is_dir() else questions.parent, questions.parent):
        for name in (split, split.partition("_")[0]):
            if matches := sorted({*folder.glob(f"{name}_choices.json"), *folder.glob(f"*/{name}_choices.json")}):
                return matches[0]
    return None


def consistency(questions: Sequence[Question], correct: Mapping[str, bool]) -> float | None:
    """Return consistency in percent; None unless every entailed question is among the questions."""
    shares = []
    for q in questions:
        entailed = [other for other in q.details["entailed"] if other != q.id]
        if any(other not in correct for other in entailed):
            return None
        if correct[q.id] and entailed:
            shares.append(sum(correct[other] for other in entailed) / len(entailed))
    return 100 * sum(shares) / len(shares) if shares else 0.0


def acceptability(questions: Sequence[Question], responses: Mapping[str, str]) -> dict[str, float | None]:
    """Return validity and plausibility in percent; None without the choices file.

    Raises:
        UserError: the choices file lacks a question.
    """
    name = questions[0].details.get("choices") if questions else None
    if name is None:
        return {"validity": None, "plausibility": None}
    choices, hits = read_json(Path(name)), Counter[str]()
    for q in questions:
        choices_of_question = typed(choices, Path(name), "the file", q.id, dict)
        for key in ("valid", "plausible"):
            accepted = typed(choices_of_question, Path(name), f"question {q.id}", key, list)
            hits[key] += responses[q.id] in (COMMON if q.details["common"] else accepted)
    return {
        "validity": 100 * hits["valid"] / len(questions),
        "plausibility": 100 * hits["plausible"] / len(questions),
    }


def distribution(questions: Sequence[Question], responses: Mapping[str, str]) -> float | None:
    """Return the chi-square distance of answers per question group, averaged by group size and divided by 100.

    None if no question belongs to a group.
    """
    true: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for q in questions:
        if (group := q.details["group"]) is not None:
            true[group][q.references[0]] += 1
            predicted[group][responses[q.id]] += 1
    sizes = {group: sum(counts.values()) for group, counts in true.items()}
    if not sizes:
        return None
    squares = {
        group: sum((predicted[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in true.items()
    }
    return sum(squares[group] * size for group, size in sizes.items()) / sum(sizes.values()) / 100
