"""SEED-Bench version 1 (Li et al., CVPR 2024): multiple choice in 12 dimensions, over images and videos.

Data: SEED-Bench.json, the images, and for videos either LLaVA's middle frames or SEED-Bench's eight frames. The splits
`image` and `video` hold the questions of one kind; papers that report one figure mostly report `image`.

Scorer: haotian-liu/LLaVA, scripts/convert_seed_for_submission.py: a response is correct if it is exactly the letter; a
question without a prediction is wrong. SEED-Bench's own eval.py ranks the options by likelihood instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.samples import Image, Video
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.choice import LETTER_PROMPT
from eval.files import json_text, write_whole
from eval.layout import fields, find_file, find_folder, read_answers_as, read_json, typed_fields
from eval.options import LETTERS, option_lines
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
FRAMES = {10: "ssv2_8_frame", 11: "kitchen_8_frame", 12: "breakfast_8_frame"}  # folders in v1_video, by dimension


@BENCHMARKS.register("seedbench")
class SEEDBench(Benchmark):
    """SEED-Bench: accuracy by exact letter match (LLaVA, convert_seed_for_submission.py)."""

    layout = (
        "<folder>/SEED-Bench.json, SEED-Bench-image/<data_id>, and for videos LLaVA's middle frames, "
        "SEED-Bench-video-image/<question_type_id>_<question_id>.png, or SEED-Bench's, "
        "v1_video/task<question_type_id>/<…>_8_frame/<question_id>/<1…8>.png"
    )
    splits = ("all", "image", "video")
    prompt = LETTER_PROMPT
    missing_is_wrong = True

    def questions(self, config: EvaluationConfig) -> list[Question]:
        path, split = find_file(config.data, ["SEED-Bench.json", "SEED-Bench*.json"], self.layout), self.split(config)
        rows, types = fields(read_json(path), path, "the file", "questions", "question_type")
        if not isinstance(rows, list) or not isinstance(types, dict):
            raise UserError(f"{path}: expected a list of 'questions', and an object of 'question_type' by name")
        dimensions = {str(number): name for name, number in types.items()}
        root = find_folder(config.data, ["."], config.media, self.layout)
        questions = []
        for number, row in enumerate(rows):
            (kind,) = typed_fields(row, path, f"question {number}", data_type=str)
            if split in ("all", kind):
                questions.append(self._question(row, number, path, root, dimensions, config))
        return questions

    def _question(
        self, row: Any, number: int, path: Path, root: Path, dimensions: dict[str, str], config: EvaluationConfig
    ) -> Question:
        where = f"question {number}"
        question_text, answer, question_id = typed_fields(
            row, path, where, question=str, answer=str, question_id=int | str
        )
        kind, dimension, data_id = typed_fields(row, path, where, data_type=str, question_type_id=int, data_id=str)
        options = list(typed_fields(row, path, where, **dict.fromkeys(CHOICES, str)))
        if answer not in tuple(LETTERS[:4]) or str(dimension) not in dimensions:
            raise UserError(f"{path}, {where}: invalid answer {answer!r} or dimension {dimension}")
        prompt = self.format_prompt(config, question=question_text, options=option_lines(options))
        media = (
            Image(root / "SEED-Bench-image" / data_id)
            if kind == "image"
            else _video_media(root, dimension, str(question_id))
        )
        sample = conversation(str(question_id), prompt, [media], str(path))
        groups = (f"type: {kind}", f"dimension: {dimensions[str(dimension)]}")
        return Question(sample.id, sample, (answer,), str(data_id), groups, {"dimension": dimension})

    def score(self, response: str, question: Question) -> Score:
        correct = float(response == question.references[0])
        return Score(correct, correct, unparsed=response not in tuple(LETTERS[:4]))

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read LLaVA's answers (`question_id`, `text`), the leaderboard's file (`question_id`, `prediction`), or the
        output of SEED-Bench's eval.py (`q_id`, `prediction`)."""
        forms = (("id", "response"), ("q_id", "prediction"), ("question_id", "prediction"), ("question_id", "text"))
        return read_answers_as(path, *forms)[0]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write JSON lines of `question_id` and `prediction`, as LLaVA does for the leaderboard."""
        rows = self.single_result(results).rows
        lines = [json_text({"question_id": row["id"], "prediction": row["response"]}) for row in rows]
        write_whole(out, "".join(lines))


def _video_media(root: Path, dimension: int, question_id: str) -> Image | Video:
    """Return the media of a video question: the middle frame, as LLaVA-1.5 uses, or the eight frames."""
    frames = root / "v1_video"
    if frames.is_dir() and not (root / "SEED-Bench-video-image").is_dir():
        return Video(frames / f"task{dimension}" / FRAMES.get(dimension, "") / question_id)
    return Image(root / "SEED-Bench-video-image" / f"{dimension}_{question_id}.png")
