"""Shared by the formats: convert turns of text with `<image>` and `<video>` placeholders to messages with media."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipelines.formats.registry import Place, shown
from data_pipelines.rows import RowError
from data_pipelines.samples import Image, Message, Part, Role, Text, Video

PLACEHOLDER = re.compile(r"\s*(<image>|<video>)\s*")
# Keys under which other datasets name their media.
UNREAD = re.compile(r"(?i:(image|img|picture|photo|video))s?([\W\d_A-Z].*)?", re.DOTALL)

Media = Image | Video


def row_media(row: dict[str, Any], place: Place) -> list[Media]:
    """Return the media of a row as `listed_media` does. Also raises RowError if its only media are under a key that is
    not read."""
    media = listed_media(row, place)
    if not media:
        check_unread(row)
    return media


def check_unread(row: dict[str, Any]) -> None:
    """Raise RowError if a row without media has a key that seems to name some: the model would be trained without
    seeing them."""
    for key in row:
        if row[key] and isinstance(key, str) and UNREAD.fullmatch(key):
            known = "video" if key.lower().startswith("video") else "image"
            raise RowError(
                f"the key {shown(key)} is not read, and there is no {known!r}; rename it to {known!r} or drop it"
            )


def listed_media(row: dict[str, Any], place: Place) -> list[Media]:
    """Return the media of a row: `image` or `images` (one or a list), then `video` or `videos`. Raises RowError."""
    media: list[Media] = [place.image(v) for key in ("image", "images") for v in _listed(row, key)]
    return media + [place.video(v) for key in ("video", "videos") for v in _listed(row, key)]


def _listed(row: dict[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]


def text_of(row: dict[str, Any], key: str, default: str | None = None) -> str:
    """Return a field that must be a string. Raises RowError that names the key."""
    value = row.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be a string, not {shown(value)}" if key in row else f"{key!r} is missing")
    return value


def is_trained(turn: dict[str, Any], number: int) -> bool:
    """Return whether a turn is trained on: not with `train: false` or OpenAI's `weight: 0`. Null counts as missing,
    because tables fill missing keys with it. Raises RowError."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"turn {number}: 'train' must be true or false, not {shown(train)}")
    if weight not in (None, 0, 1):
        raise RowError(f"turn {number}: 'weight' must be 0 or 1, not {shown(weight)}")
    return train is not False and weight != 0


def conversation(turns: Iterable[tuple[Role, str, bool]], files: Sequence[Media]) -> list[Message]:
    """Convert turns (role, text, train) to messages. Media replace the placeholders of user turns; without any
    placeholder they go before the first question. Raises RowError."""
    turns, unused = list(turns), list(files)
    placeholder = next(
        (p for p in ("<image>", "<video>") for role, text, _ in turns if role == "user" and p in text), None
    )
    if placeholder and not files:
        key = placeholder.strip("<>")
        raise RowError(f"its text has a {placeholder} placeholder, but the row names no media; add the file as {key!r}")
    messages = [
        Message(role, split_placeholders(text, unused) if role == "user" else (Text(text),), train)
        for role, text, train in turns
    ]
    messages = prepend_media(messages, unused)
    check_turns(messages)
    return messages


def split_placeholders(text: str, unused: list[Media]) -> tuple[Part, ...]:
    """Replace the placeholders of a text by media, which are removed from the front of `unused`. Raises RowError."""
    if "<" not in text:
        return (Text(text),) if text else ()
    parts: list[Part] = []
    for piece in PLACEHOLDER.split(text):
        if piece in ("<image>", "<video>"):
            # LLaVA-NeXT uses <image> for a video too.
            medium = next((m for m in unused if piece == "<image>" or isinstance(m, Video)), None)
            if medium is None:
                raise RowError(f"a {piece} placeholder has no file: the row's 'image'/'video' names too few")
            unused.remove(medium)
            parts.append(medium)
        elif piece:
            parts.append(Text(piece))
    return tuple(parts)


def prepend_media(messages: list[Message], unused: list[Media]) -> list[Message]:
    """Put media without a placeholder before the first question. Raises RowError if other media have placeholders."""
    if not unused:
        return messages
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if first is None or any(isinstance(p, Image | Video) for m in messages for p in m.parts):
        raise RowError(f"{len(unused)} of its media have no <image> or <video> placeholder")
    opening = Message("user", (*unused, *messages[first].parts))
    return [*messages[:first], opening, *messages[first + 1 :]]


def check_turns(messages: Sequence[Message]) -> None:
    """Raise RowError unless the turns are [system] user assistant user assistant …, none empty. Anything else would
    train on a question, lose an answer, or train the model to answer nothing."""
    system = bool(messages) and messages[0].role == "system"
    for number, message in enumerate(messages):
        expected = "system" if number == 0 and system else ("user", "assistant")[(number - system) % 2]
        if message.role != expected:
            raise RowError(f"turn {number} is from the {message.role}; turns must alternate, beginning with the user")
        if not any(not isinstance(p, Text) or p.text.strip() for p in message.parts):
            noun = "answer" if message.role == "assistant" else "turn"
            raise RowError(f"turn {number}: the {message.role}'s {noun} is empty")
        for part in message.parts:
            if isinstance(part, Text) and not part.text.isascii():
                _check_characters(part.text, number)
    if not any(m.role == "assistant" and m.train for m in messages):
        raise RowError("no answer to train on: no assistant turn" + (" with 'train'" if len(messages) > 1 else ""))


def _check_characters(text: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"turn {number} has an incomplete surrogate pair ({error.reason})") from error
