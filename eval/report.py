"""`report.html`: one static page that shows a run's scores, and pictures with questions and answers before and
after."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from data_pipelines.images import load_image
from data_pipelines.samples import MediaError
from data_pipelines.video import load_video
from eval.results import read_report, read_scores
from mmdora.core.config import VideoConfig

SHOWN = 12  # questions of each benchmark
THUMBNAIL = 132  # pixels, the longer side


@dataclass(frozen=True)
class Row:
    """One question on the page."""

    question: str
    pictures: list[str]  # data addresses
    reference: str
    before: str | None
    after: str
    before_right: bool
    after_right: bool


def write_report(
    path: Path, title: str, results: list[tuple[Path, Path | None]], video: VideoConfig, loss: Path
) -> None:
    """Write the page. `results` holds a result directory, and the one of the base model where it was scored too."""
    from jinja2 import Environment, FileSystemLoader

    sections = [_section(after, before, video) for after, before in results]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        sections=sections,
        loss=_address(loss.read_bytes(), "png") if loss.exists() else None,
    )
    path.write_text(page, encoding="utf-8")


def _section(after: Path, before: Path | None, video: VideoConfig) -> dict[str, Any]:
    scores = read_scores(after)
    earlier = {s["id"]: s for s in read_scores(before)} if before is not None else {}
    return {
        "report": read_report(after),
        "before": read_report(before) if before is not None else None,
        "rows": [_row(s, earlier.get(s["id"]), video) for s in shown(scores)],
    }


def shown(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The questions that people look at: up to a third wrong ones, the rest spread over the set."""
    wrong = [s for s in scores if s["official"] is not None and s["official"] < 1][: SHOWN // 3]
    right = [s for s in scores if s["official"] is None or s["official"] >= 1]
    wanted = SHOWN - len(wrong)
    step = max(1, len(right) // wanted)
    return right[::step][:wanted] + wrong


def _row(score: dict[str, Any], earlier: dict[str, Any] | None, video: VideoConfig) -> Row:
    return Row(
        question=score["question"],
        pictures=[jpeg_address(picture) for path in score["media"] for picture in thumbnails(Path(path), video)],
        reference=" / ".join(dict.fromkeys(score["references"])),
        before=earlier["response"] if earlier else None,
        after=score["response"],
        before_right=bool(earlier and (earlier["official"] or 0) >= 0.5),
        after_right=(score["official"] or 0) >= 0.5,
    )


def thumbnails(path: Path, video: VideoConfig, size: int = THUMBNAIL) -> list[PILImage.Image]:
    """The picture, or the frames that the model saw, made small (pixels, the longer side); none for a file that is
    gone."""
    try:
        pictures = [load_image(path).copy()]
    except MediaError:
        try:
            frames = load_video(path, video).frames
        except MediaError:
            return []
        pictures = [PILImage.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((size, size))
    return pictures


def jpeg_address(picture: PILImage.Image) -> str:
    """The picture as an address that holds it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _address(buffer.getvalue(), "jpeg")


def _address(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
