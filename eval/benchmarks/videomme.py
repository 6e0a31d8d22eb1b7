"""Video-MME (Fu et al., CVPR 2025): 900 videos of up to an hour, with three multiple-choice questions each.

Data: a Parquet file, or the questions as JSON, beside the videos and subtitles.

Prompt: LLaVA-1.5's, without subtitles. A prompt with `{subtitles}` includes those of the whole video
(subtitle/<videoID>.srt), since the frames are selected later.

Scorer: BradyFU/Video-MME, evaluation/eval_your_results.py: the first of the letters A to D in the response, after some
phrases are removed. Quirks reproduced: "Answer: B" reads as A, and missing commas join four phrases into two that never
match. A response without a letter is excluded from the official denominator; `strict` counts it as wrong.
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
    "The best option isThe correct option is",  # two strings joined by a missing comma
    "Best answer:Best option:",
)
# Names of the same fields in the dataset's table, its JSON file and the results template.
DURATION, DOMAIN = ("duration", "duration_category"), ("domain", "video_category")
SUB_CATEGORY, CHOICES = ("sub_category", "video_subcategory", "video_sub_category"), ("options", "choices")


@BENCHMARKS.register("videomme")
class VideoMME(Benchmark):
    """Video-MME: accuracy over answered questions (BradyFU/Video-MME, evaluation/eval_your_results.py)."""

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
        groups = (DURATION, DOMAIN, SUB_CATEGORY, CHOICES)
        duration, domain, sub_category, options = (_first_of(row, path, names) for names in groups)
        question, answer = fields(row, path, where, "question", "answer")
        if answer not in ("A", "B", "C", "D"):
            raise UserError(f"{path}, {where}: answer must be A, B, C or D, found {answer!r}")
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise UserError(f"{path}, {where}: the options must be a list of strings, found {options!r}")
        name = video_name(row)
        subtitle_text = ""
        if "{subtitles}" in (config.prompt or self.prompt) and (file := subtitles / f"{name}.srt").is_file():
            subtitle_text = spoken(read_srt(file))
        text = self.format_prompt(config, question=question, options="\n".join(options), subtitles=subtitle_text)
        sample = conversation(key, text, [Video(videos.find(name))], str(path))
        categories = (f"duration: {duration}", f"domain: {domain}", f"sub-category: {sub_category}", f"task: {kind}")
        details = {
            "video_id": str(row["video_id"]),
            "duration_category": duration,
            "video_category": domain,
            "video_subcategory": sub_category,
            "task_type": kind,
            "question": question,
            "choices": options,
        }
        return Question(key, sample, (answer,), str(row["video_id"]), categories, details)

    def score(self, response: str, question: Question) -> Score:
        letter = extract_letter(response)
        right, answered = float(letter == question.references[0]), float(bool(letter))
        return Score(right, right, unparsed=not letter, counts={"answered": answered})

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """Return the accuracy over answered (`official`; 0 if there are none) or all (`strict`) questions."""
        n = totals["answered"] if kind == "official" else totals["n"]
        return 100 * totals[kind] / np.maximum(n, 1)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the results template: the question JSON with a "response" each. Videos marked "missing" have none."""
        rows = read_json(path) if path.suffix == ".json" else None
        if not (isinstance(rows, list) and rows and isinstance(rows[0], dict) and "questions" in rows[0]):
            return super().read_predictions(path, questions)
        pairs = []
        for row in read_rows(path):
            key = str(row["question_id"])
            pairs.append((key, "" if row.get("missing") else typed(row, path, key, "response", str)))
        return pairs

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write output_test_template.json: the videos with their questions and responses."""
        result = self.single_result(results)
        videos: dict[str, dict[str, Any]] = {}
        for row in result.rows:
            details = row["details"]
            video_fields = ("video_id", "duration_category", "video_category", "video_subcategory")
            video = videos.setdefault(
                details["video_id"], {name: details[name] for name in video_fields} | {"questions": []}
            )
            question = {"question_id": row["id"]} | {
                name: details[name] for name in ("task_type", "question", "choices")
            }
            video["questions"].append(question | {"answer": row["references"][0], "response": row["response"]})
        if incomplete := [name for name, video in videos.items() if len(video["questions"]) != 3]:
            raise UserError(f"{result.folder}: video {incomplete[0]} does not have three questions")
        write_whole(out, json.dumps(list(videos.values()), indent=4, ensure_ascii=False) + "\n")


def extract_letter(response: str) -> str:
    """Return A, B, C, D or "", as the official code extracts it."""
    text = response.strip()
    for prefix in PREFIXES:
        text = text.replace(prefix, "")
    match = re.search("[ABCD]", text)
    return match[0] if match else ""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield one dict per question, including the fields of its video."""
    if path.suffix == ".parquet":
        rows: Any = read_parquet(path)
    else:
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list of videos or of questions")
    for number, row in enumerate(rows):
        where = f"row {number}"
        next(fields(row, path, where, "video_id"))
        video_fields = {name: value for name, value in row.items() if name != "questions"}
        questions = row.get("questions", [row])
        if not isinstance(questions, list):
            raise UserError(f"{path}, {where}: questions must be a list, found {type(questions).__name__}")
        for question in questions:
            list(fields(question, path, where, "question_id", "task_type"))
            yield video_fields | question


def video_name(row: Mapping[str, Any]) -> str:
    """Return the video's YouTube id, which names its files."""
    if name := row.get("videoID"):
        return str(name)
    match = re.search(r"(?:v=|youtu\.be/|shorts/)([\w-]{11})", str(row.get("url", "")))
    return match[1] if match else str(row["video_id"])


def _first_of(row: dict[str, Any], path: Path, names: Sequence[str]) -> Any:
    if (name := next((name for name in names if name in row), None)) is None:
        raise UserError(f"{path}, question {row['question_id']}: no field {' or '.join(names)}")
    return row[name]
