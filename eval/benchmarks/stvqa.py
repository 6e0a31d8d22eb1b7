"""ST-VQA (Biten et al., ICCV 2019): questions about scene text in images, task 3 (open dictionary).

Data: one JSON file per split, `{"data": [{"question_id", "question", "file_path", "answers"}]}`, beside the images. The
answers of the split `test` are not public.

Prompt: LLaVA-1.5's for short answers.

Scorer: facebookresearch/mmf, mmf/utils/m4c_evaluators.py. The headline is ANLS (STVQAANLSEvaluator), the average
normalized Levenshtein similarity to the closest answer, where a similarity below 0.5 counts as 0; the accuracy
(STVQAAccuracyEvaluator) is among the metrics. The leaderboard, rrc.cvc.uab.es (challenge 11), ranks by ANLS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.vqa import evalai_normalize
from eval.files import json_text, write_whole
from eval.layout import find_file, find_folder, read_answers_as, read_json, typed
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

THRESHOLD = 0.5


@BENCHMARKS.register("stvqa")
class STVQA(Benchmark):
    """ST-VQA: ANLS of short answers about scene text, and accuracy (facebookresearch/mmf, m4c_evaluators.py)."""

    splits = ("test", "train")
    max_new_tokens = 32
    layout = """train_task_3.json, test_task_3.json
coco-text/COCO_train2014_000000000036.jpg   (each `file_path`, also below train/, test/ or images/)"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        name = f"{self.split(config)}_task_3.json"
        path = find_file(config.data, [name, f"*/{name}"], self.layout)
        rows = typed(read_json(path), path, "the file", "data", list)
        root = find_folder(config.data, ["."], config.media, self.layout)
        subfolders = ("", "images", *self.splits)
        questions = []
        for number, row in enumerate(rows):
            where = f"question {number}"
            question_id = str(typed(row, path, where, "question_id", int))
            text, file = (typed(row, path, where, key, str) for key in ("question", "file_path"))
            places = [root / folder / file for folder in subfolders]
            image = next((place for place in places if place.is_file()), places[0])
            sample = conversation(question_id, self.format_prompt(config, question=text), [Image(image)])
            answers = read_references(row, path, where)
            questions.append(Question(question_id, sample, answers, file))
        return questions

    def score(self, response: str, question: Question) -> Score:
        return Score.free_text(anls(response, question.references), response)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        correct = [stvqa_accuracy(responses[q.id], q.references) for q in questions]
        return {"accuracy": 100 * sum(correct) / len(correct)}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the official format, `[{"question_id", "answer"}]`, or mmdora's responses.jsonl."""
        return read_answers_as(path, ("question_id", "answer"), ("id", "response"))[0]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write the leaderboard's file, `[{"question_id", "answer"}]`."""
        rows = self.single_result(results, "the split test").rows
        write_whole(out, json_text([{"question_id": int(row["id"]), "answer": row["response"]} for row in rows]))


def read_references(row: dict[str, Any], path: Path, where: str) -> tuple[str, ...]:
    """Return a row's `answers`; empty if the split has none. Raise UserError for an empty list."""
    if "answers" not in row:
        return ()
    answers = tuple(typed(row, path, where, "answers", list[str]))
    if not answers:
        raise UserError(f"{path}, {where}: no answers")
    return answers


def stvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalised prediction equals a normalised answer, else 0 (STVQAAccuracyEvaluator)."""
    return float(evalai_normalize(prediction) in {evalai_normalize(answer) for answer in answers})


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the similarity to the closest answer, 0 to 1, with values below 0.5 set to 0 (STVQAANLSEvaluator).

    Two empty strings have similarity 1; the official code divides by zero there.
    """
    return max(similarity(prediction.lower().strip(), answer.lower().strip()) for answer in answers)


def similarity(a: str, b: str) -> float:
    """Return 1 - edit distance / length of the longer string, with values below THRESHOLD set to 0."""
    length = max(len(a), len(b))
    value = 1 - edit_distance(a, b) / length if length else 1.0
    return value if value >= THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the minimum number of insertions, deletions and substitutions."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
