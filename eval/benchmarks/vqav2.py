"""`vqav2` and `okvqa`: open questions about COCO's pictures, ten annotators' answers each (Goyal et al., CVPR 2017;
Marino et al., CVPR 2019).

Scorer: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py (eval/benchmarks/vqa.py). Its accuracies by
question type and by answer type are the report's categories.

A model's words are normalised before they are scored or handed in, as LLaVA does it in
scripts/convert_vqav2_for_submission.py: the official scorer alone would count "Yes" as wrong where all ten annotators
say "yes". Predictions in the official format, `[{"question_id", "answer"}]`, are scored as they are.
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

Asked: TypeAlias = dict[str, tuple[int, str]]  # (image id, words) by question id


@dataclass(frozen=True)
class Annotation:
    image_id: int
    answers: tuple[str, ...]
    categories: tuple[str, ...]


class CocoQuestions(Benchmark):
    """What both benchmarks share: files, prompt and scorer."""

    questions_file: ClassVar[str]
    answers_file: ClassVar[str]

    def questions(self, config: EvaluationConfig) -> list[Question]:
        asked, answers, split = self.read(config)
        coco = "test2015" if split.startswith("test") else split
        places = [coco, f"images/{coco}", f"Images/mscoco/{coco}", f"Images/{coco}"]
        images = find_folder(config.data, places, config.media, self.layout)
        found = []
        for question_id, (image_id, words) in asked.items():
            annotation = answers.get(question_id, Annotation(image_id, (), ()))
            image = Image(images / f"COCO_{coco}_{image_id:012d}.jpg")
            sample = conversation(question_id, self.ask(config, question=words), [image])
            found.append(Question(question_id, sample, annotation.answers, str(image_id), annotation.categories))
        return found

    def read(self, config: EvaluationConfig) -> tuple[Asked, dict[str, Annotation], str]:
        """Questions and annotations by id, and the split: of the folder, or of the file of questions or annotations
        that `config.data` is. Annotations alone will do to score: they come without the questions' words."""
        split, root, path = self.split(config), find_path(config.data), self.source(config)
        content = read_json(path)
        if root.is_file() and isinstance(content, dict):
            split = str(content.get("data_subtype", split))
        if has_answers_alone(content):
            answers = read_annotations(content, path)
            return {i: (annotation.image_id, "") for i, annotation in answers.items()}, answers, split
        asked = read_questions(content, path)
        if split.startswith("test"):
            return asked, {}, split
        beside = self.find(root, split, self.answers_file)
        answers = read_annotations(read_json(beside), beside)
        if missing := asked.keys() - answers.keys():
            raise UserError(f"{beside}: {len(missing)} questions have no annotation, such as {min(missing)}")
        return asked, answers, split

    def source(self, config: EvaluationConfig) -> Path:
        """The questions' file, or the annotations' where there is no other."""
        root = find_path(config.data)
        return root if root.is_file() else self.find(root, self.split(config), self.questions_file, self.answers_file)

    def lacks(self, config: EvaluationConfig) -> str | None:
        path = self.source(config)
        if path.name == self.questions_file.format(self.split(config)) or not has_answers_alone(read_json(path)):
            return None
        return f"{path}: it has the answers, but not the questions' words; expected layout:\n{self.layout}"

    def find(self, root: Path, split: str, *names: str) -> Path:
        """In the folder `root` or one in it; of a file, beside it or in a folder beside its own."""
        folder, places = (root.parent, ("", "*/", "../*/")) if root.is_file() else (root, ("", "*/"))
        candidates = [f"{place}{name.format(split)}" for name in names for place in places]
        return find_file(str(folder), candidates, self.layout)

    def prediction(self, response: str) -> str:
        return evalai_normalize(response)

    def score(self, response: str, question: Question) -> Score:
        value = vqa_accuracy(response, question.references)
        return Score.of_words(value, response)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """The official format, LLaVA's answers (`{"question_id", "text"}`), or ours."""
        official = ("question_id", "answer")
        pairs, form = read_answers_as(path, official, ("question_id", "text"), ("id", "response"))
        return pairs if form == official else [(i, self.prediction(said)) for i, said in pairs]


@BENCHMARKS.register("vqav2")
class VQAv2(CocoQuestions):
    """VQA v2.0, accuracy against ten annotators (GT-Vision-Lab/VQA, vqaEval.py)."""

    splits = ("val2014", "test-dev2015", "test2015", "train2014")
    layout = """v2_OpenEnded_mscoco_val2014_questions.json   (or in a folder, as Questions/)
v2_mscoco_val2014_annotations.json   (or in a folder, as Annotations/)
val2014/COCO_val2014_000000262148.jpg   (or in images/; test2015/ for both test splits)"""
    questions_file = "v2_OpenEnded_mscoco_{}_questions.json"
    answers_file = "v2_mscoco_{}_annotations.json"

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """EvalAI's file: every test2015 question, `[{"question_id", "answer"}]`. Answers to test-dev2015 alone go in
        with the others empty, as LLaVA's do: the phase test-dev counts no more than those."""
        result = self.only_result(results, "test-dev2015 or test2015")
        answers = {row["id"]: row["response"] for row in result.rows}
        if result.rows[0]["references"]:  # val2014, to try the file
            write_whole(out, json_text([{"question_id": int(i), "answer": said} for i, said in answers.items()]))
            return
        path = self.find(find_path(result.receipt["data"]), "test2015", self.questions_file)
        asked = read_questions(read_json(path), path)
        if foreign := answers.keys() - asked.keys():
            raise UserError(f"{result.folder}: {len(foreign)} answers are to no question of {path}: {min(foreign)}")
        write_whole(out, json_text([{"question_id": int(i), "answer": answers.get(i, "")} for i in asked]))


@BENCHMARKS.register("okvqa")
class OKVQA(CocoQuestions):
    """OK-VQA, accuracy against ten answers of five annotators (GT-Vision-Lab/VQA, vqaEval.py).

    okvqa.allenai.org names that scorer; papers report the split val2014.
    """

    splits = ("val2014", "train2014")
    layout = """OpenEnded_mscoco_val2014_questions.json   (or in a folder of its own)
mscoco_val2014_annotations.json   (or in a folder of its own)
val2014/COCO_val2014_000000297147.jpg   (or in images/)"""
    questions_file = "OpenEnded_mscoco_{}_questions.json"
    answers_file = "mscoco_{}_annotations.json"


def has_answers_alone(content: Any) -> bool:
    return isinstance(content, dict) and "annotations" in content and "questions" not in content


def read_questions(content: Any, path: Path) -> Asked:
    asked: Asked = {}
    for number, row in enumerate(typed(content, path, "the file", "questions", list)):
        where = f"question {number}"
        question_id = str(typed(row, path, where, "question_id", int))
        if question_id in asked:
            raise UserError(f"{path}, {where}: question_id {question_id} is there twice")
        asked[question_id] = (typed(row, path, where, "image_id", int), typed(row, path, where, "question", str))
    return asked


def read_annotations(content: Any, path: Path) -> dict[str, Annotation]:
    """By question id. OK-VQA's question types are numbers ("eight"), which its file has the names of."""
    rows = typed(content, path, "the file", "annotations", list)
    names = typed(content, path, "the file", "question_types", dict) if "question_types" in content else {}
    answers: dict[str, Annotation] = {}
    for number, row in enumerate(rows):
        where = f"annotation {number}"
        question_id = str(typed(row, path, where, "question_id", int))
        given = tuple(typed(answer, path, where, "answer", str) for answer in typed(row, path, where, "answers", list))
        if not given or question_id in answers:
            raise UserError(f"{path}, {where}: {'question_id is there twice' if given else 'no answers'}")
        types = [(kind, row[kind]) for kind in ("question_type", "answer_type") if kind in row]
        categories = tuple(f"{kind.replace('_', ' ')}: {names.get(str(value), value)}" for kind, value in types)
        answers[question_id] = Annotation(typed(row, path, where, "image_id", int), given, categories)
    return answers
