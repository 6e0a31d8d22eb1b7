"""MVBench (Li et al., CVPR 2024): twenty temporal video tasks of 200 questions each, with two to five options.

Data: one JSON file per task, and the videos in the folders of the dataset's archives.

Scorer: OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb, `check_ans`: the first word of the response, without periods,
must be a substring of "(b)" or contain it. Quirks reproduced: "", "(" and " dog" are correct (`strict` counts them as
wrong, since they name no option), and "The answer is (B)" is wrong. "Avg" is the mean over all questions; it equals the
mean over tasks if all have the same number of questions. The mean over tasks is in the report's metrics.

The official prompt makes the response start with "Best option:(". To use it, end the prompt with these words: they
become the start of the assistant's turn, and the response is checked with the bracket prepended:

    Question: {question}
    Options:
    {choices}
    Only give the best option.
    Best option:(

`{choices}` lists the options as "(A) cat", `{options}` lists them as in LLaVA-1.5's prompts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.samples import Message, Sample, Text, Video
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score
from eval.benchmarks.choice import LETTER_PROMPT
from eval.files import json_text, write_whole
from eval.layout import fields, find_folder, read_json, read_predicted, typed
from eval.options import LETTERS, option_lines
from eval.results import Result
from eval.videos import TV_FRAMES_FPS, VideoFiles
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)
RESPONSE_START, BRACKET = "Best option:(", "("
# In the official order: each task, and its folder in video/. Rows that use part of a video have "start" and "end".
TASKS = {
    "Action Sequence": "star/Charades_v1_480",
    "Action Prediction": "star/Charades_v1_480",
    "Action Antonym": "ssv2_video",
    "Fine-grained Action": "Moments_in_Time_Raw/videos",
    "Unexpected Action": "FunQA_test/test",
    "Object Existence": "clevrer/video_validation",
    "Object Interaction": "star/Charades_v1_480",
    "Object Shuffle": "perception/videos",
    "Moving Direction": "clevrer/video_validation",
    "Action Localization": "sta/sta_video",
    "Scene Transition": "scene_qa/video",
    "Action Count": "perception/videos",
    "Moving Count": "clevrer/video_validation",
    "Moving Attribute": "clevrer/video_validation",
    "State Change": "perception/videos",
    "Fine-grained Pose": "nturgbd",
    "Character Order": "perception/videos",
    "Egocentric Navigation": "vlnqa",
    "Episodic Reasoning": "tvqa/frames_fps3_hq",
    "Counterfactual Inference": "clevrer/video_validation",
}
# The same videos in the revision `video` on Hugging Face: re-encoded as MP4, and cut from "start" to "end".
REWRITTEN = {"nturgbd": ("nturgbd_convert",), "ssv2_video": ("ssv2_video_mp4",)}
CUT = {
    "star/Charades_v1_480": "star/Charades_segment",
    "sta/sta_video": "sta/sta_video_segment",
    "tvqa/frames_fps3_hq": "tvqa/video_fps3_hq_segment",
}
BOUNDED = ("Action Sequence", "Action Prediction", "Object Interaction", "Action Localization", "Episodic Reasoning")


@BENCHMARKS.register("mvbench")
class MVBench(Benchmark):
    """MVBench: accuracy over twenty tasks (OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb)."""

    prompt = LETTER_PROMPT
    layout = """  json/<task>.json for each of the twenty tasks, as action_sequence.json
  video/ with star/Charades_v1_480/, ssv2_video/, data0613/, … as in the dataset's archives
  video/tvqa/frames_fps3_hq/<clip>/00001.jpg, three per second"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        root, media = find_path(config.data), find_folder(config.data, ["video", "."], config.media, self.layout)
        names = {task: f"{file_name(task)}.json" for task in TASKS}
        if root.is_file():
            files = {task: root for task, name in names.items() if name == root.name}
        else:
            files = {task: path for task, name in names.items() if (path := _find_task_file(root, name)) is not None}
        if not files:
            problem = "no such file or folder" if not root.exists() else "holds none of the task files"
            raise UserError(f"{root}: {problem}; expected layout:\n{self.layout}")
        if missing := [name for task, name in names.items() if task not in files]:
            log.warning("%s: these task files are missing: %s", root, ", ".join(missing))
        return [q for task, path in files.items() for q in self._task(config, task, path, media)]

    def _task(self, config: EvaluationConfig, task: str, path: Path, media: Path) -> list[Question]:
        rows, questions = read_json(path), []
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list of objects")
        for number, row in enumerate(rows):
            where = f"row {number}"
            question_text, candidates, answer, video = fields(
                row, path, where, "question", "candidates", "answer", "video"
            )
            options = list(map(str, candidates)) if isinstance(candidates, list) else []
            if not all(options) or str(answer) not in options or len(options) > len(LETTERS):
                raise UserError(f"{path}, {where}: the answer {answer!r} is not among the candidates {candidates!r}")
            lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
            text = self.format_prompt(
                config, question=question_text, options=option_lines(options), choices="\n".join(lines)
            )
            key, begun = f"{file_name(task)}-{number}", text.endswith(RESPONSE_START)
            video_part = self._video(row, task, media, path, where)
            user_turn = Message("user", (video_part, Text(text.removesuffix(RESPONSE_START).rstrip("\n"))))
            assistant_turn = (Message("assistant", (Text(RESPONSE_START),)),) if begun else ()
            details = {"answer": lines[options.index(str(answer))], "options": len(options), "begun": begun}
            reference = LETTERS[options.index(str(answer))]
            sample = Sample(key, (user_turn, *assistant_turn), str(path))
            questions.append(Question(key, sample, (reference,), str(video), (f"task: {task}",), details))
        return questions

    def _video(self, row: Any, task: str, media: Path, path: Path, where: str) -> Video:
        """Return a row's video from start to end, or the file that is cut already."""
        folder, name = TASKS[task], str(row["video"])
        folders = (folder, f"data0613/{folder}", *REWRITTEN.get(folder, ()))
        file = VideoFiles([media / place for place in folders]).find(name)
        if not file.exists() and folder in CUT and (cut := VideoFiles([media / CUT[folder]]).find(name)).exists():
            return Video(cut)
        start, end = map(_seconds, fields(row, path, where, "start", "end")) if task in BOUNDED else (None, None)
        fps = TV_FRAMES_FPS if folder.startswith("tvqa/") and file.is_dir() else None
        return Video(file, start=start, end=end, frames_fps=fps)

    def score(self, response: str, question: Question) -> Score:
        text = BRACKET + response if question.details["begun"] else response
        letters = LETTERS[: question.details["options"]]
        correct = float(check_ans(text, question.details["answer"]))
        letter = text.split(" ")[0].strip("()., \n\t:").upper()
        unparsed = len(letter) != 1 or letter not in letters
        return Score(correct, 0.0 if unparsed else correct, unparsed)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        tasks: dict[str, list[float]] = {}
        for q in questions:
            tasks.setdefault(q.categories[0], []).append(self.score(responses[q.id], q).official)
        means = [sum(values) / len(values) for values in tasks.values()]
        return {"mean_over_tasks": 100 * sum(means) / len(means), "tasks_of_official": f"{len(tasks)} of {len(TASKS)}"}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the notebook's `{"acc_dict": …, "res_list": [{"pred", "gt"}]}`, in the order of the questions."""
        saved = read_predicted(path) if path.suffix == ".json" else None
        if not isinstance(saved, dict):
            return super().read_predictions(path, questions)
        rows = next(fields(saved, path, "the file", "res_list"))
        if not isinstance(rows, list) or len(rows) != len(questions):
            raise UserError(f"{path}: res_list must hold {len(questions)} answers in the official order")
        pairs = []
        for number, (row, question) in enumerate(zip(rows, questions, strict=True)):
            where = f"res_list {number}"
            response, expected = typed(row, path, where, "pred", str), next(fields(row, path, where, "gt"))
            if expected != question.details["answer"]:
                raise UserError(f"{path}, {where}: gt {expected!r} is not {question.details['answer']!r}")
            pairs.append((question.id, response))
        return pairs

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write upload_leaderboard.json, like the notebook: each task's accuracy in percent, and "Avg"."""
        result = self.single_result(results)
        rows, correct = result.rows, {task: list[float]() for task in TASKS}
        for row in rows:
            correct[row["categories"][0].removeprefix("task: ")].append(row["official"])
        if missing := [task for task, values in correct.items() if not values]:
            raise UserError(
                f"{result.folder}: no responses for {', '.join(missing)}; the leaderboard requires all tasks"
            )
        table = {task: 100 * sum(values) / len(values) for task, values in correct.items()}
        write_whole(out, json_text(table | {"Avg": 100 * sum(row["official"] for row in rows) / len(rows)}))


def check_ans(pred: str, gt: str) -> bool:
    """Check a response against "(B) dog" like the official code, which raises IndexError for a `gt` without text."""
    option, _, content = gt.lower().partition(" ")
    if not content:
        raise IndexError("the option has no text")
    first_word = pred.lower().split(" ")[0]
    return first_word.replace(".", "") in option or option in first_word


def file_name(task: str) -> str:
    return task.lower().replace(" ", "_").replace("-", "_")


def _find_task_file(root: Path, name: str) -> Path | None:
    return next((path for path in (root / "json" / name, root / name) if path.is_file()), None)


def _seconds(time: Any) -> float | None:
    """Return a time in seconds; None for an invalid one or the start of the video."""
    return float(time) if isinstance(time, int | float) and math.isfinite(time) and time > 0 else None
