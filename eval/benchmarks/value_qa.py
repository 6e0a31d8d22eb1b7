"""`tvqa` and `how2qa`: questions on a clip and its subtitles, with five or four options; of the VALUE benchmark.

Scorers: VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_tvqa.py and evaluate_how2qa.py: the predicted
option's number against the answer's, in percent with two decimals. Answers without a public split are scored by
VALUE's server, which wants both splits in one zip file. How an option is found in an answer is ours (choice.py);
one that names none is wrong, and -1 in what is handed in.

The frames are those between the question's time stamps, as are the subtitles (`{subtitles}`); a question without
stamps is asked of the whole clip. TVQA's clips are folders of pictures, three a second.
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
    task: ClassVar[str]
    options: ClassVar[int]
    subtitles: ClassVar[str]  # their file
    files: ClassVar[dict[str, tuple[str, ...]]]  # of each split
    handed_in: ClassVar[dict[str, str]]  # the predictions of each split in the zip file
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
        said = self._subtitles(config, path)
        rows = enumerate(read_jsonl(path))
        return [self._question(config, row, (path, f"row {number}"), videos, said) for number, row in rows]

    def _question(
        self, config: EvaluationConfig, row: Any, place: tuple[Path, str], videos: VideoFiles, said: Subtitles
    ) -> Question:
        path, where = place
        columns = [f"a{i}" for i in range(self.options)]
        key, asked, video, *options = map(str, fields(row, path, where, "qid", "q", "vid_name", *columns))
        references: tuple[str, ...] = ()
        if (answer := row.get("answer_idx")) is not None:
            if not isinstance(answer, int) or answer not in range(self.options):
                raise UserError(f"{path}, {where}: answer_idx must be 0 to {self.options - 1}, found {answer!r}")
            references = (LETTERS[answer],)
        start, end = time_stamps(row.get("ts"))
        lines = spoken(said.get(video, []), start, end)
        text = self.ask(config, question=asked, options=option_lines(options), subtitles=lines)
        file = videos.find(video)
        clip = Video(file, start=start, end=end, frames_fps=TV_FRAMES_FPS if file.is_dir() else None)
        show = row.get("show_name")
        categories = () if show is None else (f"show: {show}",)
        sample = conversation(key, text, [clip], str(path))
        return Question(key, sample, references, video, categories, {"options": options})

    def _answer_alone(self, key: str, answer: int) -> Question:
        options = [""] * self.options
        return Question(key, conversation(key, ""), (LETTERS[answer],), key, (), {"options": options})

    def _subtitles(self, config: EvaluationConfig, path: Path) -> Subtitles:
        """By video; none where the prompt does not show them, or the file is not there."""
        if "{subtitles}" not in (config.prompt or self.prompt):
            return {}
        places = [folder / self.subtitles for folder in (path.parent, path.parent.parent, path.parent.parent / "ann")]
        if (file := next((place for place in places if place.is_file()), None)) is None:
            log.warning("%s: no %s; the prompt's {subtitles} stay empty", path.parent, self.subtitles)
            return {}
        return read_subtitles(file)

    def _videos(self, root: Path) -> VideoFiles:
        pictures = TV_FOLDERS if self.task == "tvqa" else ()
        return VideoFiles([root / folder for folder in (*pictures, "videos", "frames", ".")])

    def score(self, response: str, question: Question) -> Score:
        return score_choice(response, question)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """`{"<qid>": option's number}`."""
        rows = read_predicted(path) if path.suffix == ".json" else None
        if not isinstance(rows, dict):
            return super().read_predictions(path, questions)
        return [(key, LETTERS[n] if n in range(len(LETTERS)) else "") for key, n in _numbers(rows, path).items()]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """VALUE's zip file: both splits' predictions in the task's folder, without another around it."""
        if out.suffix != ".zip":
            raise UserError(f"{out}: VALUE takes a zip file, as {out.with_suffix('.zip')}")
        by_split = {result.receipt.get("split") or self.splits[0]: result for result in results}
        if len(by_split) < len(results) or set(by_split) != set(self.splits):
            found = " and ".join(str(result.receipt.get("split") or self.splits[0]) for result in results)
            raise UserError(f"VALUE wants one result of each split, {' and '.join(self.splits)}; these are of {found}")
        predictions = {split: json_text(self._predictions(by_split[split])) for split in self.splits}
        write_zip(out, {f"{self.task}/{self.handed_in[split]}": text for split, text in predictions.items()})

    def _predictions(self, result: Result) -> dict[str, int]:
        chosen = {row["id"]: chosen_option(row["response"], row["details"]["options"]) for row in result.rows}
        if odd := [key for key in chosen if not key.isdecimal()]:
            raise UserError(f"{result.folder}: {odd[0]!r} is no question id of {self.task}")
        return {key: -1 if index is None else index for key, index in chosen.items()}


@BENCHMARKS.register("tvqa")
class TVQA(ValueQA):
    """TVQA, accuracy (VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_tvqa.py)."""

    task, options, subtitles = "tvqa", 5, "tv_subtitles.jsonl"
    files: ClassVar = {
        "val": ("tvqa_val.jsonl", "tvqa_val_solution.json"),
        "test": ("tvqa_test_release.jsonl", "tvqa_test_public.jsonl"),
    }
    handed_in: ClassVar = {"val": "tvqa_val_predictions.json", "test": "tvqa_test_predictions.json"}
    layout = """  ann/tvqa/tvqa_val.jsonl and tvqa_test_release.jsonl (to score, tvqa_val_solution.json is enough)
  ann/tv_subtitles.jsonl
  frames_hq/<show>_frames/<vid_name>/00001.jpg, three a second"""

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """`{"<qid>": option's number}`; ids of no question are passed over, as the official code does."""
        pairs, asked = super().read_predictions(path, questions), {q.id for q in questions}
        if foreign := [key for key, _ in pairs if key not in asked]:
            log.warning("%s: %d ids of no question are passed over, such as %s", path, len(foreign), foreign[0])
        return [(key, answer) for key, answer in pairs if key in asked]


@BENCHMARKS.register("how2qa")
class How2QA(ValueQA):
    """How2QA, accuracy (VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_how2qa.py)."""

    task, options, subtitles = "how2qa", 4, "how2_subtitles.jsonl"
    files: ClassVar = {"val": ("how2qa_val_release.jsonl",), "test": ("how2qa_test_public_release.jsonl",)}
    handed_in: ClassVar = {"val": "how2qa_val_predictions.json", "test": "how2qa_test_public_predictions.json"}
    layout = """  ann/how2qa/how2qa_val_release.jsonl and how2qa_test_public_release.jsonl (or these files themselves)
  ann/how2_subtitles.jsonl
  videos/<vid_name>.mp4"""


def time_stamps(value: Any) -> tuple[float | None, float | None]:
    """Seconds of "20.16-25.12"; (None, None) where there are none, as in TVQA's "NaN-NaN"."""
    try:
        start, end = (float(part) for part in str(value).split("-"))
    except ValueError:
        return None, None
    if not math.isfinite(start) or not math.isfinite(end) or end < start:
        return None, None
    return start, end


def read_solution(path: Path) -> dict[str, int]:
    """The answers of `{"solution": {"<show>": {"<qid>": number}}}`, as VALUE keeps TVQA's."""
    shows = next(fields(read_json(path), path, "the file", "solution"))
    if not isinstance(shows, dict) or not all(isinstance(show, dict) for show in shows.values()):
        raise UserError(f"{path}: expected answers by question id, by show, in 'solution'")
    answers = _numbers({key: n for show in shows.values() for key, n in show.items()}, path)
    if odd := [key for key, n in answers.items() if n not in range(len(LETTERS))]:
        raise UserError(f"{path}, question {odd[0]}: {answers[odd[0]]} is no option")
    return answers


def _numbers(rows: dict[str, Any], path: Path) -> dict[str, int]:
    """Ids and numbers as the official code reads them, by `int`."""
    try:
        numbers = {str(int(key)): int(value) for key, value in rows.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: expected question ids and options' numbers ({error})") from None
    if len(numbers) < len(rows):
        raise UserError(f"{path}: two of the question ids are the same number")
    return numbers
