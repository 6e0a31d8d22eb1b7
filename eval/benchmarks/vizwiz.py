"""VizWiz-VQA (Gurari et al., CVPR 2018): questions that blind people asked about their photographs.

Data: one JSON file per split with ten answers per question, and a folder of images per split.

Prompt: LLaVA-1.5's. As in its question file (playground/data/eval/vizwiz/llava_test.jsonl), the question is
capitalised: first letter upper case, the rest lower case.

Scorer: the VizWiz API's vqaEval.py (vizwiz.org; the same logic is in TRI-ML/vlm-evaluation,
vlm_eval/util/evaluation/vizwiz/eval.py): VQA accuracy with the prediction normalised and the annotators' answers not.
Unanswerability is scored by average precision and F1: the confidence is 1 if the prediction is "unanswerable", else 0.

Quirk reproduced: most apostrophes in the API's list of contractions are backticks, so that words which already have an
apostrophe are never looked up. Its replacements for the other words ("dont") are written with ' here, as annotators
write them. A response is normalised first, as in LLaVA's scripts/convert_vizwiz_for_submission.py.
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
NUMBER = re.compile(r"0*(\d+)\.\w+$")  # 12 in VizWiz_test_00000012.jpg; LLaVA's answers use it as the id
CONTRACTIONS = {word: expanded for word, expanded in EXPANDED.items() if "'" not in word}


@BENCHMARKS.register("vizwiz")
class VizWiz(Benchmark):
    """VizWiz: accuracy against ten human answers, and unanswerability (VizWiz API, vqaEval.py)."""

    splits = ("val", "test", "train")
    prompt = (
        "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    layout = """Annotations/val.json   (or val.json; test.json for the split `test`)
val/VizWiz_val_00000000.jpg   (or images/val/…; test/ for the split `test`)"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        path = find_file(config.data, [f"Annotations/{split}.json", f"{split}.json", f"*/{split}.json"], self.layout)
        split = path.stem if path.stem in self.splits else split
        folder = find_folder(config.data, [split, f"images/{split}"], config.media, self.layout)
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list of objects with 'image' and 'question'")
        questions = []
        for number, row in enumerate(rows):
            where = f"row {number}"
            name, question_text = (typed(row, path, where, key, str) for key in ("image", "question"))
            sample = conversation(
                name, self.format_prompt(config, question=question_text.capitalize()), [Image(folder / name)]
            )
            if "answers" not in row:
                questions.append(Question(name, sample, (), name))
                continue
            annotated = typed(row, path, where, "answers", list)
            answers = tuple(typed(answer, path, where, "answer", str) for answer in annotated)
            if not answers:
                raise UserError(f"{path}, {where}: no answers")
            categories = (f"answer type: {row['answer_type']}",) if "answer_type" in row else ()
            details = {"answerable": typed(row, path, where, "answerable", int)}
            questions.append(Question(name, sample, answers, name, categories, details))
        return questions

    def prediction(self, response: str) -> str:
        return evalai_normalize(response)

    def score(self, response: str, question: Question) -> Score:
        value = vizwiz_accuracy(response, question.references)
        return Score.free_text(value, response)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        predicted = [normalize(responses[q.id]) == UNANSWERABLE for q in questions]
        return {"unanswerability": unanswerability(predicted, [not q.details["answerable"] for q in questions])}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the official format, `[{"image", "answer"}]`, LLaVA's answers or mmdora's responses.jsonl.

        LLaVA's answers are `{"question_id", "text"}` with the image's number as the id.
        """
        official = ("image", "answer")
        pairs, form = read_answers_as(path, official, ("question_id", "text"), ("id", "response"))
        if form == official:
            return pairs
        names = {match[1]: q.id for q in questions if (match := NUMBER.search(q.id))}
        return [(names.get(i, i), self.prediction(response)) for i, response in pairs]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write EvalAI's file, `[{"image", "answer"}]`."""
        result = self.single_result(results, "the split test")
        write_whole(out, json_text([{"image": row["id"], "answer": row["response"]} for row in result.rows]))


def normalize(prediction: str) -> str:
    return process_digits_and_articles(process_punctuation(strip_whitespace(prediction)), CONTRACTIONS)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy, 0 to 1; the prediction is normalised, the answers are not."""
    return leave_one_out(normalize(prediction), answers)


def unanswerability(predicted: Sequence[bool], unanswerable: Sequence[bool]) -> dict[str, float]:
    """Return average precision and F1 of detecting unanswerable questions, in percent with two decimals.

    Average precision is the area under the step function of precision over recall, as in scikit-learn. Both are 0 if
    every question can be answered.
    """
    positives, claimed = sum(unanswerable), sum(predicted)
    hits = sum(a and b for a, b in zip(predicted, unanswerable, strict=True))
    if not positives:
        return {"average_precision": 0.0, "f1_score": 0.0}
    recall = hits / positives
    precision = hits / claimed if claimed else 0.0
    average = recall * precision + (1 - recall) * positives / len(unanswerable)
    return {"average_precision": round(100 * average, 2), "f1_score": round(200 * hits / (positives + claimed), 2)}
