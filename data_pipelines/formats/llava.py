"""LLaVA's JSON: `image` (a string or a list) or `video`, and `conversations` with `human`/`gpt` turns.

`<image>` and `<video>` in the text say where the media stand; LLaVA-NeXT also writes `<image>` for a video, and media
that no placeholder names stand before the first question, as LLaVA's own loader puts them. Source:
https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Where
from data_pipelines.formats.rows import RowError, media_path, parse_rows
from data_pipelines.samples import Image, Message, Part, Rejected, Role, Sample, Text, Video

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
PLACEHOLDER = re.compile(r"\s*(<image>|<video>)\s*")


@DATASET_FORMATS.register("llava")
def read_llava(path: Path, media: Path, where: Where) -> Iterator[Sample | Rejected]:
    return parse_rows(path, where, lambda row, sample_id: parse_row(row, sample_id, str(path), media))


def parse_row(row: Any, sample_id: str, source: str, media: Path) -> Sample:
    """One row as a sample. Raises RowError with the key at fault."""
    if not isinstance(row, dict):
        raise RowError(f"expected an object with 'conversations', found {type(row).__name__}")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError("'conversations' must be a list with at least one turn")
    files = _media(row, media)
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise RowError(f"turn {number} must be an object with 'from' and a string 'value'")
        if turn.get("from") not in ROLES:
            raise RowError(f"turn {number}: 'from' is {turn.get('from')!r}; known: {', '.join(ROLES)}")
        role = ROLES[turn["from"]]
        parts = _parts(turn["value"], files) if role == "user" else (Text(turn["value"]),)
        messages.append(Message(role, parts))
    if files:  # named by no placeholder: they come before the first question
        first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
        if first is None or any(isinstance(p, Image | Video) for m in messages for p in m.parts):
            raise RowError(f"{len(files)} of its media have no <image> or <video> placeholder")
        messages[first] = Message("user", (*files, *messages[first].parts))
    _check_turns(messages)
    category = row.get("category")
    return Sample(sample_id, tuple(messages), source, None if category is None else str(category))


def _media(row: dict[str, Any], root: Path) -> list[Image | Video]:
    def paths(key: str) -> list[Path]:
        value = row.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        return [media_path(v, root) for v in values]

    return [Image(p) for p in paths("image")] + [Video(p) for p in paths("video")]


def _parts(value: str, files: list[Image | Video]) -> tuple[Part, ...]:
    """The turn's text with its placeholders replaced by media, taken from the front of `files`."""
    parts: list[Part] = []
    for piece in PLACEHOLDER.split(value):
        if piece in ("<image>", "<video>"):
            wanted = next((f for f in files if piece == "<image>" or isinstance(f, Video)), None)
            if wanted is None:
                raise RowError(f"a {piece} placeholder has no file: the row's 'image'/'video' names too few")
            files.remove(wanted)
            parts.append(wanted)
        elif piece:
            parts.append(Text(piece))
    return tuple(parts)


def _check_turns(messages: list[Message]) -> None:
    """[system] user assistant user assistant …: anything else would train on a question or lose an answer."""
    spoken = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(spoken):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            raise RowError(f"turn {number} is the {message.role}'s; turns must alternate, beginning with the user")
