"""MME (Fu et al., 2023): 14 tasks with two yes/no questions per image.

Data: one folder per task, with a text file per image; each line is a question, a tab, and Yes or No.

Prompt: LLaVA-1.5's instead of the official "Please answer yes or no."

Scorer: BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation, eval_tool/calculation.py. A response reads
as "yes" or "no" if its first four characters contain the word (quirk: "nope" and "eyes" do), else as "other". A task's
score is its accuracy plus its accuracy+ (the share of images with both questions correct), up to 100 points each. The
leaderboard shows two sums, Perception (10 tasks, 2000 points) and Cognition (4 tasks, 800 points). The headline is the
sum of all tasks; the two sums are categories. Papers that give a single figure mostly give Perception.
"""

from __future__ import annotations

import logging
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from data_pipelines.samples import Image
from eval.archives import write_zip
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.layout import read_jsonl, read_lines, typed_fields, warn_of_missing
from eval.metrics import Totals
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR"
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning"
GROUP = dict.fromkeys(PERCEPTION.split(), "Perception") | dict.fromkeys(COGNITION.split(), "Cognition")  # by task
ROOTS = ("", "MME_Benchmark_release_version", "MME_Benchmark", "MME_Benchmark_release_version/MME_Benchmark")
REQUEST = "Please answer yes or no."  # ends the official questions; LLaVA-1.5 uses its own instruction
LLAVA_REQUEST = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Row:
    """One line of the official files."""

    task: str
    image: str  # the file's name
    question: str
    answer: str  # Yes or No


def parse(response: str) -> str:
    """Read a response as "yes", "no" or "other"."""
    start = response.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def task_scores(totals: Totals) -> dict[str, np.ndarray]:
    """Return each task's points (at most 200) from sums over its questions."""
    return {
        task: 100 * (totals[f"{task} right"] / totals[f"{task} n"] + totals[f"{task} both"] / totals[f"{task} images"])
        for task in GROUP
        if f"{task} n" in totals
    }


@BENCHMARKS.register("mme")
class MME(Benchmark):
    """MME: accuracy and accuracy+ of 14 tasks, at most 2800 points (BradyFU, eval_tool/calculation.py)."""

    layout = (
        "MME_Benchmark_release_version/<task>/<image>.txt beside <image>.jpg or .png, or <task>/questions_answers_YN/"
        "<image>.txt and <task>/images/<image>.jpg; a line is a question, a tab, and Yes or No"
    )
    bounds = (0.0, 2800.0)
    settings = ()

    def questions(self, config: EvaluationConfig) -> list[Question]:
        """Read the questions; those from eval_tool/Your_Results (<task>.txt, for scoring) have no images."""
        root = find_path(config.data)
        folders = [root / name for name in ROOTS]
        folder = next((f for f in folders if any((f / task).is_dir() for task in GROUP)), None)
        pairs: list[tuple[list[Row], Path | None]]
        if folder is not None:
            pairs = [pair for task in GROUP for pair in _official(folder / task)]
        else:
            text_files = [root / f"{task}.txt" for task in GROUP]
            pairs = [pair for path in text_files if path.is_file() for pair in _listed(path)]
        if not pairs:
            problem = "holds no questions of any task" if root.is_dir() else "no such folder"
            raise UserError(f"{root}: {problem}; expected layout:\n{self.layout}")
        present = {row.task for rows, _ in pairs for row in rows}
        warn_of_missing(config.data, [task for task in GROUP if task not in present], self.layout)
        return [
            self._question(row, number, image_file, config)
            for rows, image_file in pairs
            for number, row in enumerate(rows)
        ]

    def _question(self, row: Row, number: int, image_file: Path | None, config: EvaluationConfig) -> Question:
        pair = f"{row.task}/{PurePath(row.image).stem}"
        prompt = self.format_prompt(config, question=row.question.replace(REQUEST, "").strip())
        sample = conversation(f"{pair}/{number}", prompt, [Image(image_file)] if image_file else [], row.task)
        groups = (GROUP[row.task], f"task: {row.task}")
        return Question(sample.id, sample, (row.answer.lower(),), pair, groups, asdict(row) | {"pair": pair})

    def score(self, response: str, question: Question) -> Score:
        predicted = parse(response)
        correct = float(predicted == question.references[0])
        return Score(correct, correct, unparsed=predicted == "other")

    def score_all(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Score]:
        """Score each question, and count the image's share of its task's accuracy+."""
        single = {q.id: self.score(responses[q.id], q) for q in questions}
        pairs: dict[str, list[Question]] = defaultdict(list)
        for q in questions:
            pairs[q.details["pair"]].append(q)
        scores = {}
        for pair in pairs.values():
            both, share = min(single[q.id].official for q in pair), 1 / len(pair)
            for q in pair:
                s, task = single[q.id], q.details["task"]
                sums = {"n": 1.0, "right": s.official, "images": share, "both": share * both}
                named = {f"{task} {name}": value for name, value in sums.items()}
                scores[q.id] = Score(s.official, s.strict, s.unparsed, named)
        return scores

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """Return the sum of the points of the tasks present.

        In the bootstrap, a task without an image in a draw counts as the mean of the others.
        """
        points = list(task_scores(totals).values())
        return len(points) * np.nanmean(points, axis=0)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        return {"tasks": f"{len({q.details['task'] for q in questions})} of {len(GROUP)}"}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read calculation.py's input or LLaVA's answers.

        The former is a folder (or a zip of it) of <task>.txt with tab-separated lines of image, question, answer and
        prediction; the latter are JSON lines of `question_id` (task/image), `prompt` and `text`.
        """
        ids_by_question: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for q in reversed(questions):
            ids_by_question[_key(q.details["task"], q.details["image"], q.details["question"])].append(q.id)
        if path.suffix == ".jsonl":
            rows = read_jsonl(path)
            if not all(isinstance(row, dict) and "prompt" in row for row in rows):
                return super().read_predictions(path, questions)
            predictions = list(_llava_predictions(rows, path))
        else:
            predictions = [row for task, lines in _result_files(path) for row in _predicted(path, task, lines)]
        pairs = []
        for task, image, question, response in predictions:
            ids = ids_by_question.get(_key(task, image, question), [f"{task}/{image}: {question}"])
            pairs.append((ids.pop() if len(ids) > 1 else ids[0], response))
        return pairs

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write a zip of the folder that calculation.py reads: <task>.txt for all 14 tasks, lines grouped by image."""
        result = self.single_result(results)
        if out.suffix != ".zip":
            raise UserError(
                f"{out}: MME's submission is a zip of {len(GROUP)} text files; give --out a name ending in .zip"
            )
        files: dict[str, list[str]] = {task: [] for task in GROUP}
        for row in sorted(result.rows, key=lambda row: str(row["details"]["pair"])):
            details = row["details"]
            response = " ".join(row["response"].split())  # a tab or a newline would end the field
            files[details["task"]].append(
                "\t".join([details["image"], details["question"], details["answer"], response])
            )
        if absent := [task for task, lines in files.items() if not lines]:
            raise UserError(f"{result.folder}: no responses for {', '.join(absent)}; calculation.py needs all 14 tasks")
        write_zip(out, {f"{task}.txt": "".join(f"{line}\n" for line in lines) for task, lines in files.items()})


def _official(folder: Path) -> Iterator[tuple[list[Row], Path]]:
    """Yield a task's questions per image. Raise UserError for a text file that does not hold two questions."""
    text_folder, images = folder / "questions_answers_YN", folder / "images"
    if not text_folder.is_dir():
        text_folder = images = folder
    files = {path.stem: path for path in images.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")}
    text_files = sorted(text_folder.glob("*.txt"))
    if unused := sorted(files.keys() - {text_file.stem for text_file in text_files}):
        log.warning("%s: %d images have no questions, such as %s", folder, len(unused), files[unused[0]].name)
    for text_file in text_files:
        image_file = files.get(text_file.stem, images / f"{text_file.stem}.jpg")
        cells = [_cells(line, text_file, n, 2) for n, line in enumerate(read_lines(text_file), 1)]
        yield _pair([Row(folder.name, image_file.name, *cell) for cell in cells], str(text_file)), image_file


def _listed(path: Path) -> Iterator[tuple[list[Row], None]]:
    """Yield the same from a task's text file, with lines of image, question, answer (and prediction)."""
    rows = [Row(path.stem, *_cells(line, path, n, 3)) for n, line in enumerate(read_lines(path), 1)]
    for start in range(0, len(rows), 2):
        yield _pair(rows[start : start + 2], f"{path}, line {start + 1}"), None


def _cells(line: str, path: Path, number: int, count: int) -> list[str]:
    cells = line.strip().split("\t")
    if len(cells) < count or cells[count - 1].strip().lower() not in ("yes", "no"):
        raise UserError(f"{path}, line {number}: expected a question, a tab, and Yes or No; found {line!r:.80}")
    return [cell.strip() for cell in cells[:count]]


def _pair(rows: list[Row], where: str) -> list[Row]:
    if len(rows) != 2 or rows[0].image != rows[1].image:
        found = ", ".join(row.image for row in rows) or "none"
        raise UserError(f"{where}: expected 2 questions about one image, found questions about: {found}")
    return rows


def _result_files(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each task with the lines of its text file, from a folder or a zip."""
    if path.is_dir():
        yield from ((task, read_lines(path / f"{task}.txt")) for task in GROUP if (path / f"{task}.txt").is_file())
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if PurePath(name).suffix == ".txt" and PurePath(name).stem in GROUP:
                    text = archive.read(name).decode("utf-8-sig")
                    yield PurePath(name).stem, [line for line in text.split("\n") if line.strip()]
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a folder or a zip of <task>.txt ({error})") from None


def _predicted(path: Path, task: str, lines: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    for number, line in enumerate(lines, 1):
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) != 4:
            expected = "image, question, answer and prediction, separated by tabs"
            raise UserError(f"{path}, {task}.txt, line {number}: expected {expected}; found {len(cells)} columns")
        yield task, cells[0], cells[1], cells[3]


def _llava_predictions(rows: Sequence[Any], path: Path) -> Iterator[tuple[str, str, str, str]]:
    for number, row in enumerate(rows):
        question_id, prompt, response = typed_fields(row, path, f"row {number}", question_id=str, prompt=str, text=str)
        yield question_id.split("/")[0], question_id, prompt, response


def _key(task: str, image: str, question: str) -> tuple[str, str, str]:
    words = question.replace(REQUEST, "").replace(LLAVA_REQUEST, "").split()
    return task, PurePath(image).stem, " ".join(words)
