"""`videomme`: 900 videos of up to an hour, three questions with four options each (Fu et al., CVPR 2025).

Scorer: BradyFU/Video-MME, evaluation/eval_your_results.py: the first of the letters A to D in the answer, after some
phrases are taken out ("Answer: B" is A, two of the phrases are never found for want of a comma). An answer without such
a letter is left out of the official denominator; `strict` counts it as wrong.

A prompt with `{subtitles}` shows what is said in the video (subtitle/<videoID>.srt; all of it, since the frames are
chosen later); without that field, the default, the model sees the frames alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.samples import Video
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.choice import LETTER_PROMPT
from eval.files import write_whole
from eval.layout import fields, find_file, find_folder, read_json, read_parquet, typed
from eval.metrics import Totals
from eval.results import Result
from eval.videos import VideoFiles, read_srt, spoken
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",  # two strings that a missing comma makes one
    "Best answer:Best option:",
)
DURATIONS = ("short", "medium", "long")
# The names that the dataset's table, its JSON file and the results' template have for the same things.
DURATION, DOMAIN = ("duration", "duration_category"), ("domain", "video_category")
SUB_CATEGORY, CHOICES = ("sub_category", "video_subcategory", "video_sub_category"), ("options", "choices")


@BENCHMARKS.register("videomme")
class VideoMME(Benchmark):
    """Video-MME, accuracy over answered questions (BradyFU/Video-MME, evaluation/eval_your_results.py)."""

    prompt = LETTER_PROMPT
    layout = """  videomme/test-00000-of-00001.parquet (or the questions as JSON: a list of videos with "questions")
  data/<videoID>.mp4
  subtitle/<videoID>.srt, for prompts with {subtitles}"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        candidates = ["videomme/*.parquet", "*.parquet", "*.json"]
        path = find_file(config.data, candidates, self.layout)
        videos = VideoFiles([find_folder(config.data, ["data", "videos", "."], config.media, self.layout)])
        subtitles = find_folder(config.data, ["subtitle"], None, self.layout)
        return [self._question(config, row, path, videos, subtitles) for row in read_rows(path)]

    def _question(
        self, config: EvaluationConfig, row: dict[str, Any], path: Path, videos: VideoFiles, subtitles: Path
    ) -> Question:
        key, kind = str(row["question_id"]), str(row["task_type"])
        where = f"question {key}"
        named = (DURATION, DOMAIN, SUB_CATEGORY, CHOICES)
        duration, domain, sub_category, options = (_either(row, path, names) for names in named)
        asked, answer = fields(row, path, where, "question", "answer")
        if answer not in ("A", "B", "C", "D"):
            raise UserError(f"{path}, {where}: answer must be A, B, C or D, found {answer!r}")
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise UserError(f"{path}, {where}: the options must be a list of texts, found {options!r}")
        name = video_name(row)
        said = ""
        if "{subtitles}" in (config.prompt or self.prompt) and (file := subtitles / f"{name}.srt").is_file():
            said = spoken(read_srt(file))
        text = self.ask(config, question=asked, options="\n".join(options), subtitles=said)
        sample = conversation(key, text, [Video(videos.find(name))], str(path))
        categories = (f"duration: {duration}", f"domain: {domain}", f"sub-category: {sub_category}", f"task: {kind}")
        details = {
            "video_id": str(row["video_id"]),
            "duration_category": duration,
            "video_category": domain,
            "video_subcategory": sub_category,
            "task_type": kind,
            "question": asked,
            "choices": options,
        }
        return Question(key, sample, (answer,), str(row["video_id"]), categories, details)

    def score(self, response: str, question: Question) -> Score:
        letter = extract_letter(response)
        right, answered = float(letter == question.references[0]), float(bool(letter))
        return Score(right, right, unparsed=not letter, counts={"answered": answered})

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """Percent of the answered (`official`; 0 where none is, as the script prints) or of all (`strict`)."""
        asked = totals["answered"] if kind == "official" else totals["n"]
        return 100 * totals[kind] / np.maximum(asked, 1)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """The results' template: the questions' JSON with a "response" for each. Videos marked as "missing" are not
        answered."""
        rows = read_json(path) if path.suffix == ".json" else None
        if not (isinstance(rows, list) and rows and isinstance(rows[0], dict) and "questions" in rows[0]):
            return super().read_predictions(path, questions)
        pairs = []
        for row in read_rows(path):
            key = str(row["question_id"])
            pairs.append((key, "" if row.get("missing") else typed(row, path, key, "response", str)))
        return pairs

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """output_test_template.json: the videos with their questions, and the answers as "response"."""
        result = self.only_result(results)
        videos: dict[str, dict[str, Any]] = {}
        for row in result.rows:
            details = row["details"]
            named = ("video_id", "duration_category", "video_category", "video_subcategory")
            video = videos.setdefault(details["video_id"], {name: details[name] for name in named} | {"questions": []})
            asked = {"question_id": row["id"]} | {name: details[name] for name in ("task_type", "question", "choices")}
            video["questions"].append(asked | {"answer": row["references"][0], "response": row["response"]})
        if lacking := [name for name, video in videos.items() if len(video["questions"]) != 3]:
            raise UserError(f"{result.folder}: video {lacking[0]} has not its three questions")
        write_whole(out, json.dumps(list(videos.values()), indent=4, ensure_ascii=False) + "\n")


def extract_letter(response: str) -> str:
    """The official extraction: A, B, C, D or ""."""
    said = response.strip()
    for prefix in PREFIXES:
        said = said.replace(prefix, "")
    found = re.search("[ABCD]", said)
    return found[0] if found else ""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One dict a question, what is said of its video included."""
    if path.suffix == ".parquet":
        rows: Any = read_parquet(path)
    else:
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list of videos or of questions")
    for number, row in enumerate(rows):
        where = f"row {number}"
        next(fields(row, path, where, "video_id"))
        of_video = {name: value for name, value in row.items() if name != "questions"}
        asked = row.get("questions", [row])
        if not isinstance(asked, list):
            raise UserError(f"{path}, {where}: questions must be a list, found {type(asked).__name__}")
        for question in asked:
            list(fields(question, path, where, "question_id", "task_type"))
            yield of_video | question


def video_name(row: Mapping[str, Any]) -> str:
    """The video's YouTube id, by which its files are named."""
    if name := row.get("videoID"):
        return str(name)
    address = re.search(r"(?:v=|youtu\.be/|shorts/)([\w-]{11})", str(row.get("url", "")))
    return address[1] if address else str(row["video_id"])


def _either(row: dict[str, Any], path: Path, names: Sequence[str]) -> Any:
    if (name := next((name for name in names if name in row), None)) is None:
        raise UserError(f"{path}, question {row['question_id']}: no field {' or '.join(names)}")
    return row[name]
