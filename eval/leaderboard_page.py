"""`mmdora leaderboard`'s page: one static file that needs no network, down to the single question."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.files import write_whole
from eval.leaderboard import CLEAR, Board, Column, categories, cells, models_differ, question_rows, worth
from eval.report import jpeg_address, thumbnails
from mmdora.core.config import VideoConfig

TEMPLATES = Path(__file__).parent / "templates"
MOST_QUESTIONS = 20_000  # of each benchmark on the page: VQAv2 has 214,354
MOST_PICTURES = 300  # files on the page, pictures or videos
PICTURE = 200  # pixels, the longer side
LONGEST = 2_000  # characters of a text


def write_leaderboard(path: Path, board: Board, advance: Callable[[int], None] = lambda _: None) -> None:
    """Write the page. `advance` hears of each picture that was made ready."""
    from jinja2 import Environment, FileSystemLoader

    style, script = ((TEMPLATES / f"leaderboard.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    share = pictures_of_each(board)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = script_json
    page = environment.get_template("leaderboard.html.jinja").render(
        models=board.models,
        columns=[_column(column, share, advance) for column in board.columns],
        clear=CLEAR,
        style=style,
        script=script,
        style_hash=_source(style),
        script_hash=_source(script),
    )
    write_whole(path, page)


def pictures_of_each(board: Board) -> int:
    """How many files each benchmark may show."""
    return MOST_PICTURES // max(1, len(board.columns))


def script_json(value: Any) -> Any:
    """JSON for a <script> element: no text in it can end the element, and none is markup."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _source(text: str) -> str:
    """What a content security policy allows: this very text, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _column(column: Column, share: int, advance: Callable[[int], None]) -> dict[str, Any]:
    scored = {kind: found for kind in ("official", "strict", "judged") if (found := cells(column, kind))}
    payload, pictures = _questions(column, share, advance)
    return {
        "name": column.name,
        "benchmark": column.benchmark,
        "unlike": column.unlike,
        "n": len(column.first.rows),
        "cells": scored,
        "told": [kind for kind in ("official", "judged") if kind in scored] or ["official"],
        "unparsed": {model: result.report.get("unparsed_rate") for model, result in column.results.items()},
        "categories": {kind: rows for kind in ("official", "judged") if (rows := categories(column, kind))},
        "receipts": {model: _receipt(result.receipt, result.folder) for model, result in column.results.items()},
        "models": list(column.results),
        "shown": len(payload["questions"]),
        "pictures": pictures,
        "payload": payload,
    }


def _receipt(receipt: dict[str, Any], folder: Path) -> str:
    return json.dumps({"result": str(folder), **receipt}, indent=2, ensure_ascii=False)


def _questions(column: Column, share: int, advance: Callable[[int], None]) -> tuple[dict[str, Any], dict[str, int]]:
    """What the page's script shows, questions with every model's answer and their media; and how many files there are,
    how many are shown, and how many could not be read."""
    rows, answers = question_rows(column)
    count = min(len(rows), MOST_QUESTIONS)
    kept = [i * len(rows) // count for i in range(count)]
    rows, answers = [rows[i] for i in kept], [answers[i] for i in kept]
    names = {name: i for i, name in enumerate(dict.fromkeys(c for row in rows for c in row["categories"]))}
    # Pictures of the questions that people look at first: where models differ, then where they are wrong.
    order = sorted(range(count), key=lambda i: (not models_differ(answers[i]), worth(answers[i][0]) or 0))
    places = {path: i for i, path in enumerate(dict.fromkeys(path for i in order for path in rows[i]["media"]))}
    pictures = _pictures(list(places)[:share], column.first.receipt.get("num_frames"), advance)
    payload = {
        "models": list(column.results),
        "categories": list(names),
        "media": [Path(path).name for path in places],
        "pictures": pictures,
        "questions": [
            [
                row["id"],
                _cut(row["question"]),
                [_cut(text) for text in dict.fromkeys(row["references"])],
                [names[name] for name in row["categories"]],
                [places[path] for path in row["media"]],
                [_cut(answer["response"]) for answer in given],
                [_rounded(worth(answer)) for answer in given],
            ]
            for row, given in zip(rows, answers, strict=True)
        ],
    }
    return payload, {"files": len(places), "shown": sum(map(bool, pictures)), "unread": pictures.count([])}


def _pictures(paths: list[str], frames: Any, advance: Callable[[int], None]) -> list[list[str]]:
    """Each file's thumbnails as addresses: a picture's, or those of as many `frames` of a video as the model saw."""
    video = VideoConfig(num_frames=frames) if isinstance(frames, int) and frames > 0 else VideoConfig()
    found = []
    for path in paths:
        found.append([jpeg_address(picture) for picture in thumbnails(Path(path), video, PICTURE)])
        advance(1)
    return found


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 3)
