"""DocVQA (Mathew et al., WACV 2021): questions about scanned document pages, single-page task.

Data: one JSON file per split, `{"data": [{"questionId", "question", "image", "answers"}]}`, beside the page images. The
answers of the split `test` are not public.

Prompt: LLaVA-1.5's for short answers.

Scorer: the evaluation script of the leaderboard rrc.cvc.uab.es (challenge 17), published for InfographicVQA (a copy is
in QwenLM/Qwen-VL, eval_mm/infographicsvqa_eval.py): ANLS with threshold 0.5. Quirk reproduced: the edit distance is
between the strings in lower case with single spaces, but it is divided by the length of the original strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.stvqa import THRESHOLD, edit_distance, read_references
from eval.files import json_text, write_whole
from eval.layout import find_file, find_folder, read_answers_as, read_json, typed
from eval.results import Result
from mmdora.core.config import EvaluationConfig


@BENCHMARKS.register("docvqa")
class DocVQA(Benchmark):
    """DocVQA: ANLS of short answers about document pages (evaluation script of rrc.cvc.uab.es)."""

    splits = ("val", "test", "train")
    max_new_tokens = 32
    layout = """spdocvqa_qas/val_v1.0_withQT.json, test_v1.0.json   (or val_v1.0.json; also without the folder)
spdocvqa_images/xnbl0037_1.png   (or documents/)"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
        path = find_file(config.data, [f"{place}{name}" for name in names for place in ("", "*/")], self.layout)
        rows = typed(read_json(path), path, "the file", "data", list)
        folders = ["spdocvqa_images", "documents", f"{split}/documents"]
        images = find_folder(config.data, folders, config.media, self.layout)
        questions = []
        for number, row in enumerate(rows):
            where = f"question {number}"
            question_id = str(typed(row, path, where, "questionId", int))
            text, file = (typed(row, path, where, key, str) for key in ("question", "image"))
            page = images / Path(file).name  # "documents/xnbl0037_1.png" in all releases
            sample = conversation(question_id, self.format_prompt(config, question=text), [Image(page)])
            types = typed(row, path, where, "question_types", list[str]) if "question_types" in row else []
            categories = tuple(f"question type: {name}" for name in dict.fromkeys(types))
            questions.append(Question(question_id, sample, read_references(row, path, where), page.name, categories))
        return questions

    def score(self, response: str, question: Question) -> Score:
        return Score.free_text(docvqa_anls(response, question.references), response)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the official format, `[{"questionId", "answer"}]`, or mmdora's responses.jsonl."""
        return read_answers_as(path, ("questionId", "answer"), ("id", "response"))[0]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write the leaderboard's file, `[{"questionId", "answer"}]`."""
        rows = self.single_result(results, "the split test").rows
        write_whole(out, json_text([{"questionId": int(row["id"]), "answer": row["response"]} for row in rows]))


def docvqa_anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the similarity to the closest answer, 0 to 1, with values below 0.5 set to 0."""
    distances = []
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))  # "ß" becomes two characters, as officially
        distance = edit_distance(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
        distances.append(distance / length if length else 0.0)
    value = 1 - min(distances)
    return value if value >= THRESHOLD else 0.0
