"""Captions of videos: `msrvtt_caption`, and VALUE's `tvc` and `yc2c`.

Scorers: for MSR-VTT tylin/coco-caption, as for pictures (eval/benchmarks/captions.py); for TVC and YC2C
VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_tvc.py, which evaluate_yc2c.py uses too: only the first of a
clip's predicted descriptions counts, and characters outside of ASCII become spaces.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_pipelines.samples import Video
from eval.archives import write_zip
from eval.benchmarks.base import BENCHMARKS, Question, conversation
from eval.benchmarks.captions import CaptionBenchmark, checked_caption, scorable
from eval.layout import fields, find_file, find_folder, read_json, read_jsonl
from eval.results import Result
from mmdora.config import EvaluationConfig
from mmdora.errors import UserError

VIDEO_PROMPT = "Provide a one-sentence caption for the provided video."  # LLaVA-1.5's for a picture
VIDEO_FILES = (".mp4", ".webm", ".mkv", ".avi")

MSRVTT_CATEGORIES = (  # category.txt, by number
    *("music", "people", "gaming", "sports/actions", "news/events/politics", "education", "tv shows", "movie/comedy"),
    *("animation", "vehicles/autos", "howto", "travel", "science/technology", "animals/pets", "kids/family"),
    *("documentary", "food/drink", "cooking", "beauty/fashion", "advertisement"),
)
TV_FRAMES_FPS = 3.0  # of the frames that TVQA's authors hand out in place of videos
TV_SHOWS = ("castle", "friends", "grey", "house", "met")  # their clips' names begin so; The Big Bang Theory's do not


def find_video(folder: Path, name: str) -> Path:
    """The video `name` in `folder`, whichever kind of file it is, or the directory of its frames."""
    found = (folder / f"{name}{ending}" for ending in (*VIDEO_FILES, ""))
    return next((path for path in found if path.exists()), folder / f"{name}.mp4")


@BENCHMARKS.register("msrvtt_caption")
class MSRVTTCaption(CaptionBenchmark):
    """MSR-VTT captions by CIDEr, 20 references a video (tylin/coco-caption, pycocoevalcap/eval.py)."""

    layout = """<data>/test_videodatainfo.json or <data>/MSRVTT_data.json
<data>/TestVideo/video7010.mp4 or <data>/videos/all/video7010.mp4 or <data>/MSRVTT_Videos/video7010.mp4"""
    splits = ("test", "validate")
    prompt = VIDEO_PROMPT

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        names = ["test_videodatainfo.json"] if split == "test" else ["train_val_videodatainfo.json"]
        file = find_file(config.data, [*names, "MSRVTT_data.json", "*/MSRVTT_data.json"], self.layout)
        folders = ["TestVideo" if split == "test" else "TrainValVideo", "videos/all", "MSRVTT_Videos"]
        folder = find_folder(config.data, folders, config.media, self.layout)
        videos, sentences = fields(read_json(file), file, "the file", "videos", "sentences")
        captions: dict[str, list[str]] = defaultdict(list)
        for number, row in enumerate(sentences):
            video_id, caption = fields(row, file, f"sentence {number}", "video_id", "caption")
            captions[video_id].append(checked_caption(caption, file, f"sentence {number}"))
        asked, text = [], self.ask(config)
        for number, row in enumerate(videos):
            video_id, its_split = fields(row, file, f"video {number}", "video_id", "split")
            if its_split != split:
                continue
            if video_id not in captions:
                raise UserError(f"{file}: {video_id} has no sentence")
            sample = conversation(video_id, text, [Video(find_video(folder, video_id))])
            categories = [f"category: {name}" for i, name in enumerate(MSRVTT_CATEGORIES) if i == row.get("category")]
            asked.append(Question(video_id, sample, tuple(captions[video_id]), video_id, tuple(categories)))
        return scorable(asked)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """The challenge's {"result": [{"video_id", "caption"}]}, or what COCO's results may be."""
        data = read_json(path) if path.suffix == ".json" else None
        if not isinstance(data, dict):
            return super().read_predictions(path, questions)
        (rows,) = fields(data, path, "the file", "result")
        return [tuple(fields(row, path, f"row {n}", "video_id", "caption")) for n, row in enumerate(rows)]


class ValueCaption(CaptionBenchmark):
    """Clips of VALUE (VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_tvc.py)."""

    splits = ("val", "test")
    prompt = VIDEO_PROMPT
    name: ClassVar[str]
    subtitles: ClassVar[str]  # the file of them
    id_in_submission: ClassVar[str]  # what the sample submission calls the video's name

    @abstractmethod
    def clip(self, folder: Path, row: Mapping[str, Any]) -> Video:
        """What is shown, of a row of the annotations."""

    def as_scored(self, caption: str) -> str:
        return "".join(char if ord(char) < 128 else " " for char in caption)

    def questions(self, config: EvaluationConfig) -> list[Question]:
        """`{subtitle}` in a prompt stands for what is said during the clip."""
        split = self.split(config)
        wanted = f"{self.name}_{split}_release.jsonl"
        file = find_file(config.data, [f"ann/{self.name}/{wanted}", f"{self.name}/{wanted}", wanted], self.layout)
        folder = find_folder(config.data, ["videos", "frames_hq"], config.media, self.layout)
        spoken = self.read_subtitles(config) if "{subtitle}" in (config.prompt or "") else {}
        asked = []
        for number, row in enumerate(read_jsonl(file), 1):
            clip_id, name = fields(row, file, f"row {number}", "clip_id", "vid_name")
            text = self.ask(config, subtitle=subtitle(spoken.get(name, []), row.get("ts")))
            where = f"row {number}"
            descriptions = [next(fields(d, file, where, "desc")) for d in row.get("descs", [])]
            references = [checked_caption(description, file, where) for description in descriptions]
            sample = conversation(str(clip_id), text, [self.clip(folder, row)])
            details = {"split": split, "vid_name": name, "clip_id": clip_id, "ts": row.get("ts")}
            asked.append(Question(str(clip_id), sample, tuple(references), name, details=details))
        return scorable(asked)

    def read_subtitles(self, config: EvaluationConfig) -> dict[str, list[dict[str, Any]]]:
        file = find_file(config.data, [f"ann/{self.subtitles}", self.subtitles], self.layout)
        rows = (fields(row, file, f"row {n}", "vid_name", "sub") for n, row in enumerate(read_jsonl(file), 1))
        return dict(tuple(row) for row in rows)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """VALUE's JSON lines, {"clip_id", "descs": [{"desc"}]}, or ours."""
        rows = read_jsonl(path) if path.suffix == ".jsonl" else []
        if not rows or not isinstance(rows[0], dict) or "descs" not in rows[0]:
            return super().read_predictions(path, questions)
        pairs = []
        for number, row in enumerate(rows, 1):
            clip_id, said = fields(row, path, f"row {number}", "clip_id", "descs")
            if not isinstance(said, list) or not said:
                raise UserError(f"{path}, row {number}: 'descs' holds no description")
            pairs.append((str(clip_id), str(next(fields(said[0], path, f"row {number}", "desc")))))
        return pairs

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """VALUE's zip, of this task alone: <task>/<task>_val_predictions.jsonl and the same of test."""
        found = {result.rows[0]["details"].get("split"): result for result in results}
        if len(results) != 2 or found.keys() != {"val", "test"}:
            given = ", ".join(str(result.rows[0]["details"].get("split")) for result in results)
            raise UserError(f"VALUE wants two results, of the splits val and test, not {given}")
        for result in results:
            if empty := [row["id"] for row in result.rows if not row["response"].strip()]:
                raise UserError(f"{result.folder}: {len(empty)} clips have no caption, such as {empty[0]}")
        files = {
            f"{self.name}/{self.name}_{split}_predictions.jsonl": [self.submitted(row) for row in found[split].rows]
            for split in ("val", "test")
        }
        write_zip(out, files)

    def submitted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        clip = row["details"]
        about = {self.id_in_submission: clip["vid_name"], "clip_id": clip["clip_id"]}
        return about | {"descs": [{"desc": row["response"]}]}


def subtitle(spoken: Sequence[Mapping[str, Any]], span: Any) -> str:
    """What is said while the clip runs (seconds; None: in the whole video)."""
    start, end = span or (0.0, float("inf"))
    lines = [str(line["text"]).strip() for line in spoken if line["start"] < end and line["end"] > start]
    return " ".join(line for line in lines if line)


@BENCHMARKS.register("tvc")
class TVC(ValueCaption):
    """TVC, moments of TV shows, by CIDEr (VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_tvc.py)."""

    name, subtitles, id_in_submission = "tvc", "tv_subtitles.jsonl", "vid_name"
    layout = """<data>/ann/tvc/tvc_val_release.jsonl, <data>/ann/tvc/tvc_test_release.jsonl
<data>/ann/tv_subtitles.jsonl  (for prompts with {subtitle})
<data>/frames_hq/house_frames/house_s02e05_seg02_clip_11/00001.jpg  (three a second)
  or <data>/videos/house_s02e05_seg02_clip_11.mp4"""

    def clip(self, folder: Path, row: Mapping[str, Any]) -> Video:
        name = str(row["vid_name"])
        show = next((show for show in TV_SHOWS if name.startswith(f"{show}_")), "bbt")
        frames = folder / f"{show}_frames" / name
        path = frames if frames.is_dir() else find_video(folder, name)
        start, end = row.get("ts") or (None, None)
        return Video(path, start=start, end=end, frames_fps=TV_FRAMES_FPS if path.is_dir() else None)


@BENCHMARKS.register("yc2c")
class YC2C(ValueCaption):
    """YC2C, steps of recipes, by CIDEr (VALUE-Leaderboard/EvaluationTools, scoring_program/evaluate_yc2c.py)."""

    name, subtitles, id_in_submission = "yc2c", "yc2_subtitles.jsonl", "video_id"
    layout = """<data>/ann/yc2c/yc2c_val_release.jsonl, <data>/ann/yc2c/yc2c_test_release.jsonl
<data>/ann/yc2_subtitles.jsonl  (for prompts with {subtitle})
<data>/videos/iuQjb1-WAzs_0.mp4  (YouCook2's videos cut into their segments)"""

    def clip(self, folder: Path, row: Mapping[str, Any]) -> Video:
        return Video(find_video(folder, str(row["vid_name"])))
