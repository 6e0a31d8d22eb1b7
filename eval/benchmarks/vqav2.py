"""VQAv2 (Goyal et al., CVPR 2017) and OK-VQA (Marino et al., CVPR 2019): open questions about COCO images.

Data: a question file and an annotation file with ten answers per question, beside the COCO images.

Scorer: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py (eval/benchmarks/vqa.py). Its accuracies by
question type and by answer type are the report's categories.

A model's response is normalised before it is scored or submitted, as in LLaVA's
scripts/convert_vqav2_for_submission.py: the official scorer alone counts "Yes" as wrong if all ten annotators answered
"yes". Predictions in the official format, `[{"question_id", "answer"}]`, are scored unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.vqa import evalai_normalize, vqa_accuracy
from eval.files import json_text, write_whole
from eval.layout import find_file, find_folder, read_answers_as, read_json, typed
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

QuestionTexts: TypeAlias = dict[str, tuple[int, str]]  # (image id, question) by question id


@dataclass(frozen=True)
class Annotation:
    image_id: int
    answers: tuple[str, ...]
    categories: tuple[str, ...]


class CocoQuestions(Benchmark):
    """Files, prompt and scorer that VQAv2 and OK-VQA share."""

    questions_file: ClassVar[str]
    answers_file: ClassVar[str]

    def questions(self, config: EvaluationConfig) -> list[Question]:
        texts, answers, split = self.read(config)
        coco = "test2015" if split.startswith("test") else split
        folders = [coco, f"images/{coco}", f"Images/mscoco/{coco}", f"Images/{coco}"]
        images = find_folder(config.data, folders, config.media, self.layout)
        questions = []
        for question_id, (image_id, text) in texts.items():
            annotation = answers.get(question_id, Annotation(image_id, (), ()))
            image = Image(images / f"COCO_{coco}_{image_id:012d}.jpg")
            sample = conversation(question_id, self.format_prompt(config, question=text), [image])
            questions.append(Question(question_id, sample, annotation.answers, str(image_id), annotation.categories))
        return questions

    def read(self, config: EvaluationConfig) -> tuple[QuestionTexts, dict[str, Annotation], str]:
        """Return questions by id, annotations by id, and the split.

        `config.data` is the folder, the question file or the annotation file. Annotations alone are enough to score
        predictions: the question texts are then empty.
        """
        split, root, path = self.split(config), find_path(config.data), self.source(config)
        content = read_json(path)
        if root.is_file() and isinstance(content, dict):
            split = str(content.get("data_subtype", split))
        if has_only_annotations(content):
            answers = read_annotations(content, path)
            return {i: (annotation.image_id, "") for i, annotation in answers.items()}, answers, split
        texts = read_questions(content, path)
        if split.startswith("test"):
            return texts, {}, split
        annotation_file = self.find(root, split, self.answers_file)
        answers = read_annotations(read_json(annotation_file), annotation_file)
        if missing := texts.keys() - answers.keys():
            raise UserError(f"{annotation_file}: {len(missing)} questions have no annotation, such as {min(missing)}")
        return texts, answers, split

    def source(self, config: EvaluationConfig) -> Path:
        """Return the question file, or the annotation file if there is no question file."""
        root = find_path(config.data)
        return root if root.is_file() else self.find(root, self.split(config), self.questions_file, self.answers_file)

    def missing_input(self, config: EvaluationConfig) -> str | None:
        path = self.source(config)
        if path.name == self.questions_file.format(self.split(config)) or not has_only_annotations(read_json(path)):
            return None
        return f"{path}: has annotations but no questions, which generation needs; expected layout:\n{self.layout}"

    def find(self, root: Path, split: str, *names: str) -> Path:
        """Find a file in the folder `root` or its subfolders; if `root` is a file, beside it or in a sibling folder."""
        folder, places = (root.parent, ("", "*/", "../*/")) if root.is_file() else (root, ("", "*/"))
        candidates = [f"{place}{name.format(split)}" for name in names for place in places]
        return find_file(str(folder), candidates, self.layout)

    def prediction(self, response: str) -> str:
        return evalai_normalize(response)

    def score(self, response: str, question: Question) -> Score:
        value = vqa_accuracy(response, question.references)
        return Score.free_text(value, response)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the official format, LLaVA's answers (`{"question_id", "text"}`) or mmdora's responses.jsonl."""
        official = ("question_id", "answer")
        pairs, form = read_answers_as(path, official, ("question_id", "text"), ("id", "response"))
        return pairs if form == official else [(i, self.prediction(response)) for i, response in pairs]


@BENCHMARKS.register("vqav2")
class VQAv2(CocoQuestions):
    """VQAv2: accuracy against ten human answers (GT-Vision-Lab/VQA, vqaEval.py)."""

    splits = ("val2014", "test-dev2015", "test2015", "train2014")
    layout = """v2_OpenEnded_mscoco_val2014_questions.json   (or in a folder, as Questions/)
v2_mscoco_val2014_annotations.json   (or in a folder, as Annotations/)
val2014/COCO_val2014_000000262148.jpg   (or in images/; test2015/ for both test splits)"""
    questions_file = "v2_OpenEnded_mscoco_{}_questions.json"
    answers_file = "v2_mscoco_{}_annotations.json"

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write EvalAI's file, `[{"question_id", "answer"}]`, with every test2015 question.

        A result of test-dev2015 is filled up with empty answers, as LLaVA does: the phase test-dev ignores the others.
        """
        result = self.single_result(results, "test-dev2015 or test2015")
        answers = {row["id"]: row["response"] for row in result.rows}
        if result.rows[0]["references"]:  # val2014: a test of the file
            write_whole(out, json_text([{"question_id": int(i), "answer": answer} for i, answer in answers.items()]))
            return
        path = self.find(find_path(result.receipt["data"]), "test2015", self.questions_file)
        texts = read_questions(read_json(path), path)
        if unknown := answers.keys() - texts.keys():
            raise UserError(f"{result.folder}: {len(unknown)} question ids are not in {path}, such as {min(unknown)}")
        write_whole(out, json_text([{"question_id": int(i), "answer": answers.get(i, "")} for i in texts]))


@BENCHMARKS.register("okvqa")
class OKVQA(CocoQuestions):
    """OK-VQA: accuracy against ten answers by five annotators (GT-Vision-Lab/VQA, vqaEval.py).

    okvqa.allenai.org names that scorer; papers report the split val2014.
    """

    splits = ("val2014", "train2014")
    layout = """OpenEnded_mscoco_val2014_questions.json   (or in a folder of its own)
mscoco_val2014_annotations.json   (or in a folder of its own)
val2014/COCO_val2014_000000297147.jpg   (or in images/)"""
    questions_file = "OpenEnded_mscoco_{}_questions.json"
    answers_file = "mscoco_{}_annotations.json"


def has_only_annotations(content: Any) -> bool:
    return isinstance(content, dict) and "annotations" in content and "questions" not in content


def read_questions(content: Any, path: Path) -> QuestionTexts:
    texts: QuestionTexts = {}
    for number, row in enumerate(typed(content, path, "the file", "questions", list)):
        where = f"question {number}"
        question_id = str(typed(row, path, where, "question_id", int))
        if question_id in texts:
            raise UserError(f"{path}, {where}: question_id {question_id} occurs twice")
        texts[question_id] = (typed(row, path, where, "image_id", int), typed(row, path, where, "question", str))
    return texts


def read_annotations(content: Any, path: Path) -> dict[str, Annotation]:
    """Return annotations by question id. OK-VQA's file maps its question types ("eight") to names."""
    rows = typed(content, path, "the file", "annotations", list)
    names = typed(content, path, "the file", "question_types", dict) if "question_types" in content else {}
    answers: dict[str, Annotation] = {}
    for number, row in enumerate(rows):
        where = f"annotation {number}"
        question_id = str(typed(row, path, where, "question_id", int))
        annotated = tuple(
            typed(answer, path, where, "answer", str) for answer in typed(row, path, where, "answers", list)
        )
        if not annotated or question_id in answers:
            raise UserError(
                f"{path}, {where}: {f'question_id {question_id} occurs twice' if annotated else 'no answers'}"
            )
        types = [(kind, row[kind]) for kind in ("question_type", "answer_type") if kind in row]
        categories = tuple(f"{kind.replace('_', ' ')}: {names.get(str(value), value)}" for kind, value in types)
        answers[question_id] = Annotation(typed(row, path, where, "image_id", int), annotated, categories)
    return answers
