"""ScienceQA (Lu et al., NeurIPS 2022): multiple-choice science questions, with and without images.

Data: problems.json (all problems by id), pid_splits.json (the ids of each split), and the images.

Scorers: haotian-liu/LLaVA, llava/eval/eval_science_qa.py, extracts the letter and gives the accuracy and the IMG
accuracy; lupantech/ScienceQA, tools/evaluate_acc.py, gives the accuracy by subject, context, grade and topic. Quirks of
the former are reproduced: a valid answer is a single letter, "B. …", or exactly one "The answer is B" followed by one
more character; a question without a prediction is wrong, and does not count in the IMG accuracy.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.choice import LETTER_PROMPT
from eval.files import write_whole
from eval.layout import find_file, find_folder, read_answers_as, read_json, typed_fields
from eval.options import LETTERS, option_lines
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)

OPTIONS = LETTERS[:5]
FAILED = "FAILED"  # the official code's answer for a response without one
DECLARED = re.compile(r"The answer is ([A-Z]).")  # the official pattern, with an unescaped dot
SUBJECTS = {
    "natural": "natural science",
    "social": "social science",
    "language": "language science",
}
GRADES = {
    "grade_1_6": tuple(f"grade{i}" for i in range(1, 7)),
    "grade_7_12": tuple(f"grade{i}" for i in range(7, 13)),
}
TOPIC_NAMES = """
punctuation literacy-in-science verbs pronouns civics culture word-study economics physics units-and-measurement
science-and-engineering-practices reading-comprehension global-studies grammar figurative-language us-history
writing-strategies world-history reference-skills biology earth-science phonological-awareness capitalization chemistry
vocabulary geography
"""


def answer_index(text: str, choices: int) -> int:
    """Return the index of the chosen option; -1 if the text names none of the first `choices` letters."""
    if text in tuple(OPTIONS):
        letter = text
    elif text[:1] in tuple(OPTIONS) and text[1:3] == ". ":
        letter = text[0]
    else:
        declared = DECLARED.findall(text)
        letter = declared[0] if len(declared) == 1 else FAILED
    return OPTIONS.index(letter) if letter in tuple(OPTIONS[:choices]) else -1


def breakdown(problems: Mapping[str, Mapping[str, Any]], predicted: Mapping[str, int]) -> dict[str, float | None]:
    """Return the official accuracies in percent by their official names; None for a group without problems.

    Args:
        problems: the split's problems by id, as in problems.json.
        predicted: the index of the predicted choice by id.
    """
    correct = {i: problem["answer"] == predicted[i] for i, problem in problems.items()}
    groups = {name: [i for i, p in problems.items() if p["subject"] == subject] for name, subject in SUBJECTS.items()}
    groups["has_text"] = [i for i, p in problems.items() if p["hint"]]
    groups["has_image"] = [i for i, p in problems.items() if p["image"]]
    groups["no_context"] = [i for i, p in problems.items() if not p["hint"] and not p["image"]]
    groups |= {name: [i for i, p in problems.items() if p["grade"] in grades] for name, grades in GRADES.items()}
    groups |= {topic: [i for i, p in problems.items() if p["topic"] == topic] for topic in TOPIC_NAMES.split()}
    accuracies = {f"acc_{name}": _percent([correct[i] for i in ids]) for name, ids in groups.items()}
    return accuracies | {"acc_average": sum(correct.values()) / len(predicted) * 100}


def _percent(correct: Sequence[bool]) -> float | None:
    return sum(correct) / len(correct) * 100 if correct else None


@BENCHMARKS.register("scienceqa")
class ScienceQA(Benchmark):
    """ScienceQA: accuracy and accuracy with images (LLaVA, eval_science_qa.py; ScienceQA, evaluate_acc.py)."""

    layout = "<folder>/problems.json, pid_splits.json, images/<split>/<id>/image.png"
    splits = ("test", "val", "train", "trainval", "minitest", "minival", "minitrain")
    prompt = LETTER_PROMPT

    def questions(self, config: EvaluationConfig) -> list[Question]:
        path = find_file(config.data, ["problems.json", "data/scienceqa/problems.json"], self.layout)
        images = find_folder(str(path), ["images"], config.media, self.layout)
        problems = read_json(path)
        return [
            self._question(i, problems.get(i), path, images, config) for i in split_ids(problems, path, config, self)
        ]

    def _question(self, i: str, problem: Any, path: Path, images: Path, config: EvaluationConfig) -> Question:
        where = f"problem {i!r}"
        question_text, choices, answer = typed_fields(problem, path, where, question=str, choices=list[str], answer=int)
        metadata = {name: problem.get(name) or "" for name in ("hint", "image", "grade", "subject", "topic", "split")}
        hint, image, grade, subject, _, split = typed_fields(metadata, path, where, **dict.fromkeys(metadata, str))
        if not 0 <= answer < len(choices) <= len(OPTIONS):
            raise UserError(f"{path}, {where}: answer {answer!r} is not the index of one of {len(choices)} choices")
        text = f"Context: {hint}\n{question_text}" if hint else question_text
        prompt = self.format_prompt(config, question=text, options=option_lines(choices))
        media = [Image(images / (split or self.split(config)) / i / image)] if image else []
        context = [name for name, there in (("text", hint), ("image", image)) if there] or ["none"]
        grade_range = next((name.removeprefix("grade_") for name, grades in GRADES.items() if grade in grades), grade)
        labels = [("subject", subject), *(("context", name) for name in context), ("grade", grade_range)]
        groups = tuple(f"{kind}: {name}" for kind, name in labels if name)
        details = {"choices": len(choices), "answer": answer, **metadata}
        sample = conversation(i, prompt, media, str(path))
        return Question(i, sample, (OPTIONS[answer],), i, groups, details)

    def score(self, response: str, question: Question) -> Score:
        index = answer_index(response, question.details["choices"])
        correct = float(index == question.details["answer"])
        return Score(correct, correct, unparsed=index < 0)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        predicted = {q.id: answer_index(responses[q.id], q.details["choices"]) for q in questions}
        with_image = [q for q in questions if q.details["image"] and responses[q.id] != FAILED]
        img = _percent([predicted[q.id] == q.details["answer"] for q in with_image])
        return {"img_accuracy": img, **breakdown({q.id: q.details for q in questions}, predicted)}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read LLaVA's answers or the leaderboard's file.

        The former are JSON lines of `question_id` and `text`. The latter has `results`, the index of each answer, and,
        if LLaVA wrote it, `outputs`, the responses.
        """
        pairs = list(_predictions(path))
        predicted_ids = {i for i, _ in pairs}
        if missing := [q.id for q in questions if q.id not in predicted_ids]:
            log.warning(
                "%s: %d questions without a prediction count as wrong, such as %s", path, len(missing), missing[0]
            )
        return pairs + [(i, FAILED) for i in missing]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write the file that lupantech/ScienceQA's evaluate_acc.py reads, as LLaVA writes it."""
        rows = self.single_result(results).rows
        predicted = {row["id"]: answer_index(row["response"], row["details"]["choices"]) for row in rows}
        correct = sum(predicted[row["id"]] == row["details"]["answer"] for row in rows)
        summary = {"acc": correct / len(rows) * 100, "correct": correct, "count": len(rows)}
        responses_by_id = {row["id"]: row["response"] for row in rows}
        text = json.dumps({**summary, "results": predicted, "outputs": responses_by_id}, ensure_ascii=False, indent=2)
        write_whole(out, text + "\n")


def split_ids(problems: Any, path: Path, config: EvaluationConfig, benchmark: Benchmark) -> list[str]:
    """Return the ids of the split's problems, from pid_splits.json or else from each problem's `split` field."""
    split, splits_file = benchmark.split(config), path.parent / "pid_splits.json"
    if not isinstance(problems, dict):
        raise UserError(f"{path}: expected an object of problems by id")
    if splits_file.is_file():
        (ids,) = typed_fields(read_json(splits_file), splits_file, "the splits", **{split: list[str]})
        return list(ids)
    split_by_id = {i: problem.get("split") if isinstance(problem, dict) else None for i, problem in problems.items()}
    if split not in split_by_id.values():
        raise UserError(f"{path}: no problems of the split {split!r}; expected layout:\n{benchmark.layout}")
    return [i for i, name in split_by_id.items() if name == split]


def _predictions(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".json" and isinstance(content := read_json(path), dict):
        indices, outputs = typed_fields({"outputs": {}} | content, path, "the file", results=dict, outputs=dict)
        for i, index in indices.items():
            if not isinstance(index, int) or not -1 <= index < len(OPTIONS):
                raise UserError(f"{path}: result {i!r}: {index!r} is not the index of a choice")
        responses_by_id = {i: outputs.get(i, OPTIONS[index] if index >= 0 else FAILED) for i, index in indices.items()}
        yield from zip(
            responses_by_id,
            typed_fields(responses_by_id, path, "outputs", **dict.fromkeys(responses_by_id, str)),
            strict=True,
        )
        return
    yield from read_answers_as(path, ("id", "response"), ("question_id", "text"))[0]
