"""What the formats share: turns of plain text with `<image>` and `<video>` in them become messages with media."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipelines.formats.registry import Place, shown
from data_pipelines.rows import RowError
from data_pipelines.samples import Image, Message, Part, Role, Text, Video

PLACEHOLDER = re.compile(r"\s*(<image>|<video>)\s*")
UNREAD = re.compile(r"(?i:(image|img|picture|photo|video))s?([\W\d_A-Z].*)?", re.DOTALL)  # what others name media

Media = Image | Video


def row_media(row: dict[str, Any], place: Place) -> list[Media]:
    """As `listed_media`. Raises RowError, too, for a row that has media only under a key that is not read."""
    found = listed_media(row, place)
    if not found:
        check_unread(row)
    return found


def check_unread(row: dict[str, Any]) -> None:
    """For a row without media: raise RowError for a key that seems to name some. They would be trained on unseen."""
    for key in row:
        if row[key] and isinstance(key, str) and UNREAD.fullmatch(key):
            right = "video" if key.lower().startswith("video") else "image"
            raise RowError(f"has {shown(key)}, which is not read, and no {right!r}; rename it to {right!r}, or drop it")


def listed_media(row: dict[str, Any], place: Place) -> list[Media]:
    """The media of a row: `image` or `images` (one, or a list), then `video` or `videos`. Raises RowError."""
    found: list[Media] = [place.image(v) for key in ("image", "images") for v in _listed(row, key)]
    return found + [place.video(v) for key in ("video", "videos") for v in _listed(row, key)]


def _listed(row: dict[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]


def text_of(row: dict[str, Any], key: str, default: str | None = None) -> str:
    """A field that must be a string. Raises RowError that names the key."""
    value = row.get(key, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be a string, found {shown(value)}" if key in row else f"{key!r} is missing")
    return value


def learnt(turn: dict[str, Any], number: int) -> bool:
    """Whether an answer is learnt: not with `train: false`, nor with OpenAI's `weight: 0`. Null says nothing: tables
    have it where a key is missing. Raises RowError."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"turn {number}: 'train' must be true or false, found {shown(train)}")
    if weight not in (None, 0, 1):
        raise RowError(f"turn {number}: 'weight' must be 0 or 1, found {shown(weight)}")
    return train is not False and weight != 0


def conversation(turns: Iterable[tuple[Role, str, bool]], files: Sequence[Media]) -> list[Message]:
    """Turns (role, text, train) as messages: media stand where a user's placeholders are; where no placeholder stands,
    before the first question. Raises RowError."""
    turns, left = list(turns), list(files)
    named = next((p for p in ("<image>", "<video>") for role, text, _ in turns if role == "user" and p in text), None)
    if named and not files:
        key = named.strip("<>")
        raise RowError(f"the row names no media, and its text holds a {named} placeholder; give the file in {key!r}")
    messages = [
        Message(role, split(text, left) if role == "user" else (Text(text),), train) for role, text, train in turns
    ]
    messages = lead(messages, left)
    check(messages)
    return messages


def split(text: str, left: list[Media]) -> tuple[Part, ...]:
    """The text with its placeholders replaced by media, which are taken from the front of `left`."""
    if "<" not in text:
        return (Text(text),) if text else ()
    parts: list[Part] = []
    for piece in PLACEHOLDER.split(text):
        if piece in ("<image>", "<video>"):
            # LLaVA-NeXT writes <image> for a video, too.
            wanted = next((f for f in left if piece == "<image>" or isinstance(f, Video)), None)
            if wanted is None:
                raise RowError(f"a {piece} placeholder has no file: the row's 'image'/'video' names too few")
            left.remove(wanted)
            parts.append(wanted)
        elif piece:
            parts.append(Text(piece))
    return tuple(parts)


def lead(messages: list[Message], left: list[Media]) -> list[Message]:
    """Media that no placeholder names, before the first question."""
    if not left:
        return messages
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if first is None or any(isinstance(p, Image | Video) for m in messages for p in m.parts):
        raise RowError(f"{len(left)} of its media have no <image> or <video> placeholder")
    opening = Message("user", (*left, *messages[first].parts))
    return [*messages[:first], opening, *messages[first + 1 :]]


def check(messages: Sequence[Message]) -> None:
    """[system] user assistant user assistant …, each with something to say: anything else would train on a question,
    lose an answer, or teach the model to say nothing."""
    system = bool(messages) and messages[0].role == "system"
    for number, message in enumerate(messages):
        expected = "system" if number == 0 and system else ("user", "assistant")[(number - system) % 2]
        if message.role != expected:
            raise RowError(f"turn {number} is the {message.role}'s; turns must alternate, beginning with the user")
        if not any(not isinstance(p, Text) or p.text.strip() for p in message.parts):
            what = "answer" if message.role == "assistant" else "turn"
            raise RowError(f"turn {number}: the {message.role}'s {what} is empty")
        for part in message.parts:
            if isinstance(part, Text) and not part.text.isascii():
                _check_characters(part.text, number)
    if not any(m.role == "assistant" and m.train for m in messages):
        raise RowError("no answer to learn: it has no assistant turn" + (" with 'train'" if len(messages) > 1 else ""))


def _check_characters(text: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"turn {number} holds half of a surrogate pair ({error.reason})") from error
