"""Find a benchmark's video files, and read their subtitles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from eval.layout import fields, read_jsonl
from mmdora.core.errors import UserError

SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov", ".gif", "")  # "": a directory of images
CUE = re.compile(r"(\d+):(\d\d):(\d\d)[,.](\d+)\s*-->\s*(\d+):(\d\d):(\d\d)[,.](\d+)")
# TVQA's authors distribute frames instead of videos.
TV_FRAMES_FPS = 3.0
TV_FOLDERS = tuple(f"frames_hq/{show}_frames" for show in ("bbt", "castle", "friends", "grey", "house", "met"))
MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


class VideoFiles:
    """Videos by name, in the first of `folders` that has one with any of SUFFIXES. Each name is looked up once."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = list(folders)
        self._found: dict[tuple[str, ...], Path] = {}

    def find(self, *names: str) -> Path:
        """Return the file of the first of `names` that exists, or else the expected one. Suffixes are optional."""
        if names not in self._found:
            places = [f / f"{name}{suffix}" for f in self._folders for name in names for suffix in SUFFIXES]
            expected = self._folders[0] / (names[0] + ("" if Path(names[0]).suffix else ".mp4"))
            self._found[names] = next((place for place in places if place.exists()), expected)
        return self._found[names]


class Line(NamedTuple):
    """A subtitle, displayed from `start` to `end` (seconds)."""

    text: str
    start: float
    end: float


Subtitles: TypeAlias = dict[str, list[Line]]  # by video


def read_subtitles(path: Path) -> Subtitles:
    """Read VALUE's JSON lines, {"vid_name", "sub": [{"text", "start", "end"}]}. Raises UserError."""
    by_video = {}
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"row {number}"
        video, subtitles = fields(row, path, where, "vid_name", "sub")
        if not isinstance(subtitles, list):
            raise UserError(f"{path}, {where}: 'sub' is not a list of subtitles")
        lines = [tuple(fields(line, path, where, "text", "start", "end")) for line in subtitles]
        try:
            by_video[str(video)] = [Line(str(text).strip(), float(start), float(end)) for text, start, end in lines]
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, {where}: 'start' and 'end' of a subtitle must be numbers ({error})") from None
    return by_video


def read_srt(path: Path) -> list[Line]:
    """Read a SubRip file, without its markup. Raises UserError if it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    lines = []
    for block in re.split(r"\n\s*\n", text):
        if (cue := CUE.search(block)) is None:
            continue
        hours, minutes, seconds, thousandths = zip(cue.groups()[:4], cue.groups()[4:], strict=True)
        times = zip(hours, minutes, seconds, thousandths, strict=True)
        start, end = (int(h) * 3600 + int(m) * 60 + float(f"{s}.{t}") for h, m, s, t in times)
        lines.append(Line(" ".join(MARKUP.sub("", block[cue.end() :]).split()), start, end))
    return lines


def spoken(lines: Sequence[Line], start: float | None = None, end: float | None = None) -> str:
    """Return the subtitles displayed between `start` and `end`, one per line. None stands for the video's bounds."""
    low, high = (0.0 if start is None else start), (float("inf") if end is None else end)
    return "\n".join(line.text for line in lines if line.text and line.end > low and line.start < high)
