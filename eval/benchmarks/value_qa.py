"""TVQA and How2QA in the VALUE benchmark: multiple choice about a video clip and its subtitles.

Data: JSON lines per split with four or five options per question, a subtitle file, and the videos. TVQA's clips are
folders of frames, three per second. Frames and subtitles (`{subtitles}`) are those between the question's timestamps;
without timestamps they cover the whole clip.

Scorers: VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_tvqa.py and evaluate_how2qa.py: accuracy of the
option index, in percent with two decimals. The official code does not define how to extract an option from a response;
choice.py does. A response that names no option is wrong, and -1 in the submission. The test splits are scored by
VALUE's server, which takes both splits in one zip file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_pipelines.samples import Video
from eval.archives import write_zip
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.choice import LETTER_PROMPT, chosen_option, score_choice
from eval.files import json_text
from eval.layout import fields, find_file, read_json, read_jsonl, read_predicted
from eval.options import LETTERS, option_lines
from eval.results import Result
from eval.videos import TV_FOLDERS, TV_FRAMES_FPS, Subtitles, VideoFiles, read_subtitles, spoken
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)


class ValueQA(Benchmark):
    """Multiple choice in the VALUE benchmark."""

    task: ClassVar[str]
    options: ClassVar[int]  # number of options per question
    subtitles: ClassVar[str]  # subtitle file
    files: ClassVar[dict[str, tuple[str, ...]]]  # question files by split
    submission_files: ClassVar[dict[str, str]]  # prediction files in the zip by split
    splits = ("val", "test")
    prompt = "Subtitles:\n{subtitles}\n" + LETTER_PROMPT

    def questions(self, config: EvaluationConfig) -> list[Question]:
        names = self.files[self.split(config)]
        folders = ("", f"{self.task}/", f"ann/{self.task}/")
        path = find_file(config.data, [folder + name for name in names for folder in folders], self.layout)
        if path.suffix == ".json":
            return [self._answer_alone(*pair) for pair in read_solution(path).items()]
        root = find_path(config.media) if config.media else find_path(config.data)
        videos = self._videos(root.parent if root.is_file() else root)
        subtitles = self._subtitles(config, path)
        rows = enumerate(read_jsonl(path))
        return [self._question(config, row, (path, f"row {number}"), videos, subtitles) for number, row in rows]

    def _question(
        self, config: EvaluationConfig, row: Any, location: tuple[Path, str], videos: VideoFiles, subtitles: Subtitles
    ) -> Question:
        path, where = location
        columns = [f"a{i}" for i in range(self.options)]
        key, question, video, *options = map(str, fields(row, path, where, "qid", "q", "vid_name", *columns))
        references: tuple[str, ...] = ()
        if (answer := row.get("answer_idx")) is not None:
            if not isinstance(answer, int) or answer not in range(self.options):
                raise UserError(f"{path}, {where}: answer_idx must be 0 to {self.options - 1}, found {answer!r}")
            references = (LETTERS[answer],)
        start, end = time_stamps(row.get("ts"))
        lines = spoken(subtitles.get(video, []), start, end)
        text = self.format_prompt(config, question=question, options=option_lines(options), subtitles=lines)
        file = videos.find(video)
        video_part = Video(file, start=start, end=end, frames_fps=TV_FRAMES_FPS if file.is_dir() else None)
        show = row.get("show_name")
        categories = () if show is None else (f"show: {show}",)
        sample = conversation(key, text, [video_part], str(path))
        return Question(key, sample, references, video, categories, {"options": options})

    def _answer_alone(self, key: str, answer: int) -> Question:
        options = [""] * self.options
        return Question(key, conversation(key, ""), (LETTERS[answer],), key, (), {"options": options})

    def _subtitles(self, config: EvaluationConfig, path: Path) -> Subtitles:
        """Return the subtitles by video; empty if the prompt has no `{subtitles}` or the file is missing."""
        if "{subtitles}" not in (config.prompt or self.prompt):
            return {}
        places = [folder / self.subtitles for folder in (path.parent, path.parent.parent, path.parent.parent / "ann")]
        if (file := next((location for location in places if location.is_file()), None)) is None:
            log.warning("%s: no %s; {subtitles} in the prompt stays empty", path.parent, self.subtitles)
            return {}
        return read_subtitles(file)

    def _videos(self, root: Path) -> VideoFiles:
        frame_folders = TV_FOLDERS if self.task == "tvqa" else ()
        return VideoFiles([root / folder for folder in (*frame_folders, "videos", "frames", ".")])

    def score(self, response: str, question: Question) -> Score:
        return score_choice(response, question)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read `{"<qid>": option index}`."""
        rows = read_predicted(path) if path.suffix == ".json" else None
        if not isinstance(rows, dict):
            return super().read_predictions(path, questions)
        return [(key, LETTERS[n] if n in range(len(LETTERS)) else "") for key, n in _parse_indices(rows, path).items()]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write VALUE's zip file: the predictions of both splits in the task's folder, at the top level."""
        if out.suffix != ".zip":
            raise UserError(f"{out}: VALUE takes a zip file, such as {out.with_suffix('.zip')}")
        by_split = {result.receipt.get("split") or self.splits[0]: result for result in results}
        if len(by_split) < len(results) or set(by_split) != set(self.splits):
            given = " and ".join(str(result.receipt.get("split") or self.splits[0]) for result in results)
            raise UserError(f"VALUE takes one result of each split, {' and '.join(self.splits)}; got {given}")
        predictions = {split: json_text(self._predictions(by_split[split])) for split in self.splits}
        write_zip(out, {f"{self.task}/{self.submission_files[split]}": text for split, text in predictions.items()})

    def _predictions(self, result: Result) -> dict[str, int]:
        chosen = {row["id"]: chosen_option(row["response"], row["details"]["options"]) for row in result.rows}
        if invalid := [key for key in chosen if not key.isdecimal()]:
            raise UserError(f"{result.folder}: {invalid[0]!r} is not a question id of {self.task}")
        return {key: -1 if index is None else index for key, index in chosen.items()}


@BENCHMARKS.register("tvqa")
class TVQA(ValueQA):
    """TVQA: accuracy (VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_tvqa.py)."""

    task, options, subtitles = "tvqa", 5, "tv_subtitles.jsonl"
    files: ClassVar = {
        "val": ("tvqa_val.jsonl", "tvqa_val_solution.json"),
        "test": ("tvqa_test_release.jsonl", "tvqa_test_public.jsonl"),
    }
    submission_files: ClassVar = {"val": "tvqa_val_predictions.json", "test": "tvqa_test_predictions.json"}
    layout = """  ann/tvqa/tvqa_val.jsonl and tvqa_test_release.jsonl (to score, tvqa_val_solution.json is enough)
  ann/tv_subtitles.jsonl
  frames_hq/<show>_frames/<vid_name>/00001.jpg, three per second"""

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read `{"<qid>": option index}`. Unknown ids are ignored, as in the official code."""
        pairs, known = super().read_predictions(path, questions), {q.id for q in questions}
        if unknown := [key for key, _ in pairs if key not in known]:
            log.warning("%s: ignored %d unknown question ids, such as %s", path, len(unknown), unknown[0])
        return [(key, answer) for key, answer in pairs if key in known]


@BENCHMARKS.register("how2qa")
class How2QA(ValueQA):
    """How2QA: accuracy (VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_how2qa.py)."""

    task, options, subtitles = "how2qa", 4, "how2_subtitles.jsonl"
    files: ClassVar = {"val": ("how2qa_val_release.jsonl",), "test": ("how2qa_test_public_release.jsonl",)}
    submission_files: ClassVar = {"val": "how2qa_val_predictions.json", "test": "how2qa_test_public_predictions.json"}
    layout = """  ann/how2qa/how2qa_val_release.jsonl and how2qa_test_public_release.jsonl (or these files themselves)
  ann/how2_subtitles.jsonl
  videos/<vid_name>.mp4"""


def time_stamps(value: Any) -> tuple[float | None, float | None]:
    """Parse "20.16-25.12" into seconds; (None, None) if there are none, as in TVQA's "NaN-NaN"."""
    try:
        start, end = (float(part) for part in str(value).split("-"))
    except ValueError:
        return None, None
    if not math.isfinite(start) or not math.isfinite(end) or end < start:
        return None, None
    return start, end


def read_solution(path: Path) -> dict[str, int]:
    """Read the answers from `{"solution": {"<show>": {"<qid>": index}}}`, VALUE's format for TVQA."""
    shows = next(fields(read_json(path), path, "the file", "solution"))
    if not isinstance(shows, dict) or not all(isinstance(show, dict) for show in shows.values()):
        raise UserError(f"{path}: 'solution' must map shows to answers by question id")
    answers = _parse_indices({key: n for show in shows.values() for key, n in show.items()}, path)
    if invalid := [key for key, n in answers.items() if n not in range(len(LETTERS))]:
        raise UserError(f"{path}, question {invalid[0]}: {answers[invalid[0]]} is not an option index")
    return answers


def _parse_indices(rows: dict[str, Any], path: Path) -> dict[str, int]:
    """Convert ids and indices with `int`, as the official code does."""
    try:
        numbers = {str(int(key)): int(value) for key, value in rows.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: expected question ids and option indices ({error})") from None
    if len(numbers) < len(rows):
        raise UserError(f"{path}: two question ids are equal as integers")
    return numbers
