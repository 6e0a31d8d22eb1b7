"""Video captioning: MSR-VTT, and VALUE's TVC and YC2C.

Data: the official annotations beside the videos; TVC's videos may be folders of frames.

Scorers: tylin/coco-caption for MSR-VTT, as for images (eval/benchmarks/captions.py). For TVC and YC2C,
VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_tvc.py, which evaluate_yc2c.py uses too: only the first
predicted description of a clip counts, and non-ASCII characters become spaces.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from data_pipelines.samples import Video
from eval.archives import write_zip
from eval.benchmarks.base import BENCHMARKS, Question, conversation
from eval.benchmarks.captions import CaptionBenchmark, checked_caption, require_scorer
from eval.files import json_text
from eval.layout import fields, find_file, read_json, read_jsonl, read_predicted, typed
from eval.results import Result
from eval.videos import TV_FOLDERS, TV_FRAMES_FPS, Subtitles, VideoFiles, read_subtitles, spoken
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

VIDEO_PROMPT = "Provide a one-sentence caption for the provided video."  # LLaVA-1.5's image prompt, adapted
MSRVTT_FOLDERS = ("TestVideo", "videos/all", "MSRVTT_Videos", "TrainValVideo", ".")
MSRVTT_CATEGORIES = (  # category.txt, by number
    *("music", "people", "gaming", "sports/actions", "news/events/politics", "education", "tv shows", "movie/comedy"),
    *("animation", "vehicles/autos", "howto", "travel", "science/technology", "animals/pets", "kids/family"),
    *("documentary", "food/drink", "cooking", "beauty/fashion", "advertisement"),
)

Span: TypeAlias = tuple[float, float] | tuple[None, None]  # seconds; None: the whole video


def videos_of(config: EvaluationConfig, *folders: str) -> VideoFiles:
    """Return the videos in `config.media`, or in the first of `folders` (beside the question file) that has each."""
    if config.media is not None:
        return VideoFiles([find_path(config.media)])
    root = find_path(config.data)
    root = root.parent if root.is_file() else root
    return VideoFiles([root / folder for folder in folders])


@BENCHMARKS.register("msrvtt_caption")
class MSRVTTCaption(CaptionBenchmark):
    """MSR-VTT captions: CIDEr with 20 references per video (tylin/coco-caption, pycocoevalcap/eval.py)."""

    layout = """<data>/test_videodatainfo.json or <data>/MSRVTT_data.json
<data>/TestVideo/video7010.mp4 or <data>/videos/all/video7010.mp4 or <data>/MSRVTT_Videos/video7010.mp4"""
    splits = ("test", "validate")
    prompt = VIDEO_PROMPT

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        names = ["test_videodatainfo.json"] if split == "test" else ["train_val_videodatainfo.json"]
        file = find_file(config.data, [*names, "MSRVTT_data.json", "*/MSRVTT_data.json"], self.layout)
        files = videos_of(config, *MSRVTT_FOLDERS)
        videos, sentences = fields(read_json(file), file, "the file", "videos", "sentences")
        captions: dict[str, list[str]] = defaultdict(list)
        for number, row in enumerate(sentences):
            video_id, caption = fields(row, file, f"sentence {number}", "video_id", "caption")
            captions[video_id].append(checked_caption(caption, file, f"sentence {number}"))
        questions, text = [], self.format_prompt(config)
        for number, row in enumerate(videos):
            video_id, split_of_video = fields(row, file, f"video {number}", "video_id", "split")
            if split_of_video != split:
                continue
            if video_id not in captions:
                raise UserError(f"{file}: video {video_id} has no caption")
            sample = conversation(video_id, text, [Video(files.find(video_id))])
            categories = [f"category: {name}" for i, name in enumerate(MSRVTT_CATEGORIES) if i == row.get("category")]
            questions.append(Question(video_id, sample, tuple(captions[video_id]), video_id, tuple(categories)))
        return require_scorer(questions)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the challenge's `{"result": [{"video_id", "caption"}]}`, or the formats of COCO."""
        data = read_predicted(path) if path.suffix == ".json" else None
        if not isinstance(data, dict):
            return super().read_predictions(path, questions)
        rows = typed(data, path, "the file", "result", list)
        pairs = []
        for number, row in enumerate(rows):
            video_id, caption = fields(row, path, f"row {number}", "video_id", "caption")
            pairs.append((str(video_id), checked_caption(caption, path, f"row {number}")))
        return pairs


class ValueCaption(CaptionBenchmark):
    """Captions of VALUE's clips (VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_tvc.py)."""

    splits = ("val", "test")
    prompt = VIDEO_PROMPT
    task: ClassVar[str]
    subtitles: ClassVar[str]  # subtitle file
    id_in_submission: ClassVar[str]  # field of the video's name in the sample submission
    folders: ClassVar[tuple[str, ...]]  # video folders

    @abstractmethod
    def clip(self, file: Path, span: Span) -> Video:
        """Return the part of a video that the question shows."""

    def preprocess(self, caption: str) -> str:
        return "".join(char if ord(char) < 128 else " " for char in caption)

    def questions(self, config: EvaluationConfig) -> list[Question]:
        """Read the questions. `{subtitles}` in a prompt is replaced by the subtitles during the clip."""
        split = self.split(config)
        file_name = f"{self.task}_{split}_release.jsonl"
        file = find_file(
            config.data, [f"ann/{self.task}/{file_name}", f"{self.task}/{file_name}", file_name], self.layout
        )
        files = videos_of(config, *self.folders)
        subtitles: Subtitles = {}
        if "{subtitles}" in (config.prompt or ""):
            subtitles = read_subtitles(find_file(config.data, [f"ann/{self.subtitles}", self.subtitles], self.layout))
        questions = []
        for number, row in enumerate(read_jsonl(file), 1):
            where = f"row {number}"
            clip_id, name = fields(row, file, where, "clip_id", "vid_name")
            span = checked_span(row.get("ts"), file, where)
            text = self.format_prompt(config, subtitles=spoken(subtitles.get(name, []), *span))
            descriptions = [next(fields(d, file, where, "desc")) for d in row.get("descs") or []]
            references = [checked_caption(description, file, where) for description in descriptions]
            sample = conversation(str(clip_id), text, [self.clip(files.find(str(name)), span)])
            details = {"split": split, "vid_name": name, "clip_id": clip_id}
            questions.append(Question(str(clip_id), sample, tuple(references), str(name), details=details))
        return require_scorer(questions)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read VALUE's JSON lines, `{"clip_id", "descs": [{"desc"}]}`, or mmdora's responses.jsonl."""
        rows = read_jsonl(path) if path.suffix == ".jsonl" else []
        if not rows or not isinstance(rows[0], dict) or "descs" not in rows[0]:
            return super().read_predictions(path, questions)
        pairs = []
        for number, row in enumerate(rows, 1):
            clip_id, descriptions = fields(row, path, f"row {number}", "clip_id", "descs")
            if not isinstance(descriptions, list) or not descriptions:
                raise UserError(f"{path}, row {number}: 'descs' must be a non-empty list")
            caption = next(fields(descriptions[0], path, f"row {number}", "desc"))
            pairs.append((str(clip_id), checked_caption(caption, path, f"row {number}")))
        return pairs

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write VALUE's zip for this task: <task>/<task>_val_predictions.jsonl and the same for test."""
        by_split = {result.rows[0]["details"].get("split"): result for result in results}
        if len(results) != 2 or by_split.keys() != {"val", "test"}:
            given = ", ".join(str(result.rows[0]["details"].get("split")) for result in results)
            raise UserError(f"VALUE takes two results, of the splits val and test; got {given}")
        for result in results:
            if empty := [row["id"] for row in result.rows if not row["response"].strip()]:
                raise UserError(f"{result.folder}: {len(empty)} clips have no caption, such as {empty[0]}")
        files = {}
        for split in ("val", "test"):
            lines = [json_text(self.submitted(row)) for row in by_split[split].rows]
            files[f"{self.task}/{self.task}_{split}_predictions.jsonl"] = "".join(lines)
        write_zip(out, files)

    def submitted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        clip = row["details"]
        about = {self.id_in_submission: clip["vid_name"], "clip_id": clip["clip_id"]}
        return about | {"descs": [{"desc": row["response"]}]}


def checked_span(span: Any, file: Path, where: str) -> Span:
    match span:
        case None:
            return None, None
        case [int() | float() as start, int() | float() as end]:
            return float(start), float(end)
    raise UserError(f"{file}, {where}: 'ts' must be the start and end of the clip in seconds, found {span!r:.60}")


@BENCHMARKS.register("tvc")
class TVC(ValueCaption):
    """TVC: CIDEr of captions of TV show moments (VALUE-Leaderboard/EvaluationTools, evaluate_tvc.py)."""

    task, subtitles, id_in_submission = "tvc", "tv_subtitles.jsonl", "vid_name"
    folders = (*TV_FOLDERS, "videos", "frames", ".")
    layout = """<data>/ann/tvc/tvc_val_release.jsonl, <data>/ann/tvc/tvc_test_release.jsonl
<data>/ann/tv_subtitles.jsonl  (for prompts with {subtitles})
<data>/frames_hq/house_frames/house_s02e05_seg02_clip_11/00001.jpg  (three frames per second)
  or <data>/videos/house_s02e05_seg02_clip_11.mp4"""

    def clip(self, file: Path, span: Span) -> Video:
        start, end = span
        return Video(file, start=start, end=end, frames_fps=TV_FRAMES_FPS if file.is_dir() else None)


@BENCHMARKS.register("yc2c")
class YC2C(ValueCaption):
    """YC2C: CIDEr of captions of recipe steps (VALUE-Leaderboard/EvaluationTools, evaluate_yc2c.py)."""

    task, subtitles, id_in_submission = "yc2c", "yc2_subtitles.jsonl", "video_id"
    folders = ("videos", ".")
    layout = """<data>/ann/yc2c/yc2c_val_release.jsonl, <data>/ann/yc2c/yc2c_test_release.jsonl
<data>/ann/yc2_subtitles.jsonl  (for prompts with {subtitles})
<data>/videos/iuQjb1-WAzs_0.mp4  (YouCook2's videos, cut into segments)"""

    def clip(self, file: Path, span: Span) -> Video:
        return Video(file)
