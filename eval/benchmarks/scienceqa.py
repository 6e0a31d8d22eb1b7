"""`scienceqa`: ScienceQA (Lu et al., NeurIPS 2022), with and without pictures.

Scorers: haotian-liu/LLaVA, llava/eval/eval_science_qa.py, reads the letter and gives the accuracy and the IMG accuracy;
lupantech/ScienceQA, tools/evaluate_acc.py, breaks it down by subject, context, grade and topic. Kept of the first: an
answer is a letter alone, "B. …", or "The answer is B" and one more character, just once; a question without a
prediction is wrong, and is none of those with a picture.
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
FAILED = "FAILED"  # what the official code takes for the answer where there is none
DECLARED = re.compile(r"The answer is ([A-Z]).")  # the official pattern: its dot is any character
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
    """The choice that was said, from 0; -1 where there is none to be read, or it is not one of `choices`."""
    if text in tuple(OPTIONS):
        letter = text
    elif text[:1] in tuple(OPTIONS) and text[1:3] == ". ":
        letter = text[0]
    else:
        declared = DECLARED.findall(text)
        letter = declared[0] if len(declared) == 1 else FAILED
    return OPTIONS.index(letter) if letter in tuple(OPTIONS[:choices]) else -1


def breakdown(problems: Mapping[str, Mapping[str, Any]], predicted: Mapping[str, int]) -> dict[str, float | None]:
    """The official accuracies in percent, by the official names; None for a group without problems.

    `problems` are those of the split by id, as in problems.json; `predicted` holds the index of each one's answer.
    """
    right = {i: problem["answer"] == predicted[i] for i, problem in problems.items()}
    groups = {name: [i for i, p in problems.items() if p["subject"] == subject] for name, subject in SUBJECTS.items()}
    groups["has_text"] = [i for i, p in problems.items() if p["hint"]]
    groups["has_image"] = [i for i, p in problems.items() if p["image"]]
    groups["no_context"] = [i for i, p in problems.items() if not p["hint"] and not p["image"]]
    groups |= {name: [i for i, p in problems.items() if p["grade"] in grades] for name, grades in GRADES.items()}
    groups |= {topic: [i for i, p in problems.items() if p["topic"] == topic] for topic in TOPIC_NAMES.split()}
    found = {f"acc_{name}": _percent([right[i] for i in ids]) for name, ids in groups.items()}
    return found | {"acc_average": sum(right.values()) / len(predicted) * 100}


def _percent(right: Sequence[bool]) -> float | None:
    return sum(right) / len(right) * 100 if right else None


@BENCHMARKS.register("scienceqa")
class ScienceQA(Benchmark):
    """ScienceQA, accuracy (LLaVA, eval_science_qa.py; lupantech/ScienceQA, tools/evaluate_acc.py)."""

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
        asked, choices, answer = typed_fields(problem, path, where, question=str, choices=list[str], answer=int)
        about = {name: problem.get(name) or "" for name in ("hint", "image", "grade", "subject", "topic", "split")}
        hint, image, grade, subject, _, split = typed_fields(about, path, where, **dict.fromkeys(about, str))
        if not 0 <= answer < len(choices) <= len(OPTIONS):
            raise UserError(f"{path}, {where}: answer {answer!r} is none of {len(choices)} choices")
        text = f"Context: {hint}\n{asked}" if hint else asked
        words = self.ask(config, question=text, options=option_lines(choices))
        media = [Image(images / (split or self.split(config)) / i / image)] if image else []
        context = [name for name, there in (("text", hint), ("image", image)) if there] or ["none"]
        years = next((name.removeprefix("grade_") for name, grades in GRADES.items() if grade in grades), grade)
        named = [("subject", subject), *(("context", name) for name in context), ("grade", years)]
        groups = tuple(f"{kind}: {name}" for kind, name in named if name)
        details = {"choices": len(choices), "answer": answer, **about}
        sample = conversation(i, words, media, str(path))
        return Question(i, sample, (OPTIONS[answer],), i, groups, details)

    def score(self, response: str, question: Question) -> Score:
        index = answer_index(response, question.details["choices"])
        right = float(index == question.details["answer"])
        return Score(right, right, unparsed=index < 0)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        predicted = {q.id: answer_index(responses[q.id], q.details["choices"]) for q in questions}
        shown = [q for q in questions if q.details["image"] and responses[q.id] != FAILED]
        img = _percent([predicted[q.id] == q.details["answer"] for q in shown])
        return {"img_accuracy": img, **breakdown({q.id: q.details for q in questions}, predicted)}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """LLaVA's answers (JSON lines of `question_id` and `text`), or the leaderboard's file, whose `results` hold
        the index of each answer (and `outputs`, where LLaVA wrote it, what was said)."""
        pairs = list(_predictions(path))
        given = {i for i, _ in pairs}
        if missing := [q.id for q in questions if q.id not in given]:
            log.warning("%s: %d ids without an answer count as wrong, such as %s", path, len(missing), missing[0])
        return pairs + [(i, FAILED) for i in missing]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """The file that lupantech/ScienceQA's evaluate_acc.py reads, as LLaVA writes it."""
        rows = self.only_result(results).rows
        predicted = {row["id"]: answer_index(row["response"], row["details"]["choices"]) for row in rows}
        correct = sum(predicted[row["id"]] == row["details"]["answer"] for row in rows)
        summary = {"acc": correct / len(rows) * 100, "correct": correct, "count": len(rows)}
        said = {row["id"]: row["response"] for row in rows}
        text = json.dumps({**summary, "results": predicted, "outputs": said}, ensure_ascii=False, indent=2)
        write_whole(out, text + "\n")


def split_ids(problems: Any, path: Path, config: EvaluationConfig, benchmark: Benchmark) -> list[str]:
    """The ids of the split's problems, from pid_splits.json, or without it by what each problem says of itself."""
    split, listed = benchmark.split(config), path.parent / "pid_splits.json"
    if not isinstance(problems, dict):
        raise UserError(f"{path}: expected an object of problems by id")
    if listed.is_file():
        (ids,) = typed_fields(read_json(listed), listed, "the splits", **{split: list[str]})
        return list(ids)
    said = {i: problem.get("split") if isinstance(problem, dict) else None for i, problem in problems.items()}
    if split not in said.values():
        raise UserError(f"{path}: has no problems of the split {split!r}; expected layout:\n{benchmark.layout}")
    return [i for i, name in said.items() if name == split]


def _predictions(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".json" and isinstance(found := read_json(path), dict):
        indices, outputs = typed_fields({"outputs": {}} | found, path, "the file", results=dict, outputs=dict)
        for i, index in indices.items():
            if not isinstance(index, int) or not -1 <= index < len(OPTIONS):
                raise UserError(f"{path}: result {i!r} is {index!r}, not the index of a choice")
        said = {i: outputs.get(i, OPTIONS[index] if index >= 0 else FAILED) for i, index in indices.items()}
        yield from zip(said, typed_fields(said, path, "outputs", **dict.fromkeys(said, str)), strict=True)
        return
    yield from read_answers_as(path, ("id", "response"), ("question_id", "text"))[0]
