"""The page of `mmdora leaderboard`: one static file that needs no network and shows every question."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.files import write_whole
from eval.leaderboard import SIGNIFICANCE, Board, Column, answer_score, categories, cells, models_differ, question_rows
from eval.report import jpeg_url, thumbnails
from mmdora.core.config import VideoConfig

TEMPLATES = Path(__file__).parent / "templates"
MAX_QUESTIONS = 20_000  # on the page, for each benchmark (VQAv2 has 214,354)
MAX_MEDIA_FILES = 300  # images and videos on the page
THUMBNAIL = 200  # pixels, the longer side
MAX_TEXT = 2_000  # characters


def write_leaderboard(path: Path, board: Board, advance: Callable[[int], None] = lambda _: None) -> None:
    """Write the page. `advance` is called after each image or video that is read."""
    from jinja2 import Environment, FileSystemLoader

    style, script = ((TEMPLATES / f"leaderboard.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    share = max_media_per_benchmark(board)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = script_json
    page = environment.get_template("leaderboard.html.jinja").render(
        models=board.models,
        columns=[_column(column, share, advance) for column in board.columns],
        significance=SIGNIFICANCE,
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )
    write_whole(path, page)


def max_media_per_benchmark(board: Board) -> int:
    """Return how many images and videos of each benchmark fit on the page."""
    return MAX_MEDIA_FILES // max(1, len(board.columns))


def script_json(value: Any) -> Any:
    """Return JSON for a <script> element: no text in it can end the element or act as markup."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _csp_hash(text: str) -> str:
    """Return the hash with which a content security policy allows this text only."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _column(column: Column, share: int, advance: Callable[[int], None]) -> dict[str, Any]:
    scored = {kind: found for kind in ("official", "strict", "judged") if (found := cells(column, kind))}
    payload, media = _questions(column, share, advance)
    return {
        "name": column.name,
        "benchmark": column.benchmark,
        "differences": column.differences,
        "n": len(column.first.rows),
        "cells": scored,
        "ranked_kinds": [kind for kind in ("official", "judged") if kind in scored] or ["official"],
        "unparsed": {model: result.report.get("unparsed_rate") for model, result in column.results.items()},
        "categories": {kind: rows for kind in ("official", "judged") if (rows := categories(column, kind))},
        "receipts": {model: _receipt(result.receipt, result.folder) for model, result in column.results.items()},
        "models": list(column.results),
        "num_questions": len(payload["questions"]),
        "media": media,
        "payload": payload,
    }


def _receipt(receipt: dict[str, Any], folder: Path) -> str:
    return json.dumps({"result": str(folder), **receipt}, indent=2, ensure_ascii=False)


def _questions(column: Column, share: int, advance: Callable[[int], None]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the data of the page's script (questions, all models' answers, media), and how many media files there are,
    are on the page, and could not be read."""
    rows, answers = question_rows(column)
    count = min(len(rows), MAX_QUESTIONS)
    kept = [i * len(rows) // count for i in range(count)]
    rows, answers = [rows[i] for i in kept], [answers[i] for i in kept]
    names = {name: i for i, name in enumerate(dict.fromkeys(c for row in rows for c in row["categories"]))}
    # Media of the most informative questions come first: where models differ, then where they are wrong.
    order = sorted(range(count), key=lambda i: (not models_differ(answers[i]), answer_score(answers[i][0]) or 0))
    places = {path: i for i, path in enumerate(dict.fromkeys(path for i in order for path in rows[i]["media"]))}
    images = _images(list(places)[:share], column.first.receipt.get("num_frames"), advance)
    payload = {
        "models": list(column.results),
        "categories": list(names),
        "media": [Path(path).name for path in places],
        "images": images,
        "questions": [
            [
                row["id"],
                _cut(row["question"]),
                [_cut(text) for text in dict.fromkeys(row["references"])],
                [names[name] for name in row["categories"]],
                [places[path] for path in row["media"]],
                [_cut(answer["response"]) for answer in given],
                [_rounded(answer_score(answer)) for answer in given],
            ]
            for row, given in zip(rows, answers, strict=True)
        ],
    }
    return payload, {"files": len(places), "shown": sum(map(bool, images)), "unreadable": images.count([])}


def _images(paths: list[str], num_frames: Any, advance: Callable[[int], None]) -> list[list[str]]:
    """Return each file's thumbnails as data URLs: one for an image, the frames that the model saw for a video."""
    known = isinstance(num_frames, int) and num_frames > 0
    video = VideoConfig(num_frames=num_frames) if known else VideoConfig()
    urls = []
    for path in paths:
        urls.append([jpeg_url(image) for image in thumbnails(Path(path), video, THUMBNAIL)])
        advance(1)
    return urls


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT:,} more characters)"


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 3)
