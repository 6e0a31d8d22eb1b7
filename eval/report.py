"""`report.html`: one static page with a run's scores, and example answers before and after training."""

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

EXAMPLES = 12  # questions of each benchmark
THUMBNAIL = 132  # pixels, the longer side


@dataclass(frozen=True)
class Example:
    """One question on the page."""

    question: str
    images: list[str]  # data URLs
    reference: str
    before: str | None
    after: str
    before_correct: bool
    after_correct: bool


def write_report(
    path: Path, title: str, results: list[tuple[Path, Path | None]], video: VideoConfig, loss: Path
) -> None:
    """Write the page.

    Args:
        results: for each benchmark the result directory, and that of the base model if it was evaluated too.
        video: how the model samples frames, for the thumbnails of videos.
        loss: the image of the training loss, which need not exist.
    """
    from jinja2 import Environment, FileSystemLoader

    sections = [_section(after, before, video) for after, before in results]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        sections=sections,
        loss=_data_url(loss.read_bytes(), "png") if loss.exists() else None,
    )
    path.write_text(page, encoding="utf-8")


def _section(after: Path, before: Path | None, video: VideoConfig) -> dict[str, Any]:
    rows = read_scores(after)
    rows_before = {row["id"]: row for row in read_scores(before)} if before is not None else {}
    return {
        "report": read_report(after),
        "before": read_report(before) if before is not None else None,
        "examples": [_example(row, rows_before.get(row["id"]), video) for row in select_examples(rows)],
    }


def select_examples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return up to EXAMPLES rows of scores.jsonl: up to a third wrong answers, the rest evenly spaced."""
    wrong = [row for row in rows if row["official"] is not None and row["official"] < 1][: EXAMPLES // 3]
    correct = [row for row in rows if row["official"] is None or row["official"] >= 1]
    wanted = EXAMPLES - len(wrong)
    step = max(1, len(correct) // wanted)
    return correct[::step][:wanted] + wrong


def _example(row: dict[str, Any], row_before: dict[str, Any] | None, video: VideoConfig) -> Example:
    return Example(
        question=row["question"],
        images=[jpeg_url(image) for path in row["media"] for image in thumbnails(Path(path), video)],
        reference=" / ".join(dict.fromkeys(row["references"])),
        before=row_before["response"] if row_before else None,
        after=row["response"],
        before_correct=bool(row_before and (row_before["official"] or 0) >= 0.5),
        after_correct=(row["official"] or 0) >= 0.5,
    )


def thumbnails(path: Path, video: VideoConfig, size: int = THUMBNAIL) -> list[PILImage.Image]:
    """Return small copies of an image, or of the frames of a video that the model saw; none for an unreadable file.

    `size` is the longer side in pixels.
    """
    try:
        images = [load_image(path).copy()]
    except MediaError:
        try:
            frames = load_video(path, video).frames
        except MediaError:
            return []
        images = [PILImage.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((size, size))
    return images


def jpeg_url(image: PILImage.Image) -> str:
    """Return the image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return _data_url(buffer.getvalue(), "jpeg")


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
