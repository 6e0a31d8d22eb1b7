"""`vizwiz`: questions that blind people asked about their photographs, ten answers each (Gurari et al., CVPR 2018).

Scorer: the VizWiz API's vqaEval.py (vizwiz.org; its logic is also in TRI-ML/vlm-evaluation,
vlm_eval/util/evaluation/vizwiz/eval.py): VQA's accuracy, with the prediction normalised and the annotators' answers
not. Unanswerability: every question whose prediction is "unanswerable" is taken to be told to be so with the
confidence 1, the others with 0, and average precision and F1 are of that.

The API's list of contractions has most of its apostrophes as `, so that a word which has an apostrophe already is never
found in it: that is kept. What it makes of the others ("dont") is written with ' here, since annotators write it so.

A model's words are normalised first as LLaVA does it in scripts/convert_vizwiz_for_submission.py. As in its questions
(playground/data/eval/vizwiz/llava_test.jsonl), a question begins with a capital and is lower case else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.vqa import (
    EXPANDED,
    evalai_normalize,
    leave_one_out,
    process_digits_and_articles,
    process_punctuation,
    strip_whitespace,
)
from eval.files import json_text, write_whole
from eval.layout import find_file, find_folder, read_answers_as, read_json, typed
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

UNANSWERABLE = "unanswerable"
NUMBER = re.compile(r"0*(\d+)\.\w+$")  # of VizWiz_test_00000012.jpg 12, by which LLaVA's answers name it
CONTRACTIONS = {word: expanded for word, expanded in EXPANDED.items() if "'" not in word}


@BENCHMARKS.register("vizwiz")
class VizWiz(Benchmark):
    """VizWiz-VQA, accuracy against ten annotators, and unanswerability (the VizWiz API's vqaEval.py)."""

    splits = ("val", "test", "train")
    prompt = (
        "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    layout = """Annotations/val.json   (or val.json; test.json for the split test)
val/VizWiz_val_00000000.jpg   (or images/val/…; test/ for the split test)"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        path = find_file(config.data, [f"Annotations/{split}.json", f"{split}.json", f"*/{split}.json"], self.layout)
        split = path.stem if path.stem in self.splits else split
        folder = find_folder(config.data, [split, f"images/{split}"], config.media, self.layout)
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list of objects with 'image' and 'question'")
        found = []
        for number, row in enumerate(rows):
            where = f"row {number}"
            name, words = (typed(row, path, where, key, str) for key in ("image", "question"))
            sample = conversation(name, self.ask(config, question=words.capitalize()), [Image(folder / name)])
            if "answers" not in row:
                found.append(Question(name, sample, (), name))
                continue
            given = typed(row, path, where, "answers", list)
            answers = tuple(typed(answer, path, where, "answer", str) for answer in given)
            if not answers:
                raise UserError(f"{path}, {where}: no answers")
            categories = (f"answer type: {row['answer_type']}",) if "answer_type" in row else ()
            details = {"answerable": typed(row, path, where, "answerable", int)}
            found.append(Question(name, sample, answers, name, categories, details))
        return found

    def prediction(self, response: str) -> str:
        return evalai_normalize(response)

    def score(self, response: str, question: Question) -> Score:
        value = vizwiz_accuracy(response, question.references)
        return Score.of_words(value, response)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        told = [normalize(responses[q.id]) == UNANSWERABLE for q in questions]
        return {"unanswerability": unanswerability(told, [not q.details["answerable"] for q in questions])}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """The official format, `[{"image", "answer"}]`, LLaVA's answers (`{"question_id", "text"}`, the id being the
        picture's number), or ours."""
        official = ("image", "answer")
        pairs, form = read_answers_as(path, official, ("question_id", "text"), ("id", "response"))
        if form == official:
            return pairs
        names = {found[1]: q.id for q in questions if (found := NUMBER.search(q.id))}
        return [(names.get(i, i), self.prediction(said)) for i, said in pairs]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """EvalAI's file, `[{"image", "answer"}]`."""
        result = self.only_result(results, "the split test")
        write_whole(out, json_text([{"image": row["id"], "answer": row["response"]} for row in result.rows]))


def normalize(prediction: str) -> str:
    return process_digits_and_articles(process_punctuation(strip_whitespace(prediction)), CONTRACTIONS)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0 to 1, the prediction normalised and the answers not."""
    return leave_one_out(normalize(prediction), answers)


def unanswerability(told: Sequence[bool], true: Sequence[bool]) -> dict[str, float]:
    """Average precision (the area under the steps of precision over recall, as scikit-learn has it) and F1 of telling
    which questions cannot be answered, in percent with two decimals; 0 where all can be."""
    positives, claimed = sum(true), sum(told)
    hits = sum(a and b for a, b in zip(told, true, strict=True))
    if not positives:
        return {"average_precision": 0.0, "f1_score": 0.0}
    recall = hits / positives
    precision = hits / claimed if claimed else 0.0
    average = recall * precision + (1 - recall) * positives / len(true)
    return {"average_precision": round(100 * average, 2), "f1_score": round(200 * hits / (positives + claimed), 2)}
