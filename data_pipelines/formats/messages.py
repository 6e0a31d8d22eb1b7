"""OpenAI's chat messages: `content` is a string or a list of parts (`text`, `image_url`, `image`, `video`).

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                                {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}]}

A row is the object, or just the list. A part without a file takes the next one of the row's `images`/`videos`, or the
one at its `index`, as in TRL's vision datasets. A turn with `train: false` or `weight: 0` is only context. Source:
https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, shown
from data_pipelines.formats.turns import (
    Media,
    check_turns,
    check_unread,
    is_trained,
    listed_media,
    prepend_media,
    split_placeholders,
)
from data_pipelines.rows import RowError
from data_pipelines.samples import Image, Message, Part, Role, Sample, Text, Video

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXTS = ("text", "input_text", "output_text")
MEDIA = {"image": Image, "image_url": Image, "input_image": Image}
MEDIA |= {"video": Video, "video_url": Video, "input_video": Video}  # type: ignore[dict-item]


@DATASET_FORMATS.register("messages")
class Messages(Format):
    """OpenAI's chat messages: `content` is a string or a list of parts."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return isinstance(row.get("messages"), list)

    def parse(self, row: Any, place: Place) -> Sample:
        row = {"messages": row} if isinstance(row, list) else row
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
            raise RowError("'messages' must be a list with at least one turn")
        listed = listed_media(row, place)
        unused = list(listed)
        messages = [self._message(turn, number, listed, unused, place) for number, turn in enumerate(row["messages"])]
        messages = prepend_media(messages, unused)
        check_turns(messages)
        if all(isinstance(part, Text) for message in messages for part in message.parts):
            check_unread(row)
        return place.sample(messages, row.get("category"))

    def _message(self, turn: Any, number: int, listed: list[Media], unused: list[Media], place: Place) -> Message:
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(f"turn {number}: 'role' is {shown(role)}; known: {', '.join(ROLES)}")
        if turn.get("tool_calls"):
            raise RowError(f"turn {number}: 'tool_calls' are not supported; remove such rows")
        content = turn.get("content")
        parts: tuple[Part, ...]
        if isinstance(content, str):
            parts = split_placeholders(content, unused) if role == "user" and listed else (Text(content),)
        elif isinstance(content, list):
            parts = tuple(
                self._part(part, f"turn {number}, part {i}", listed, unused, place) for i, part in enumerate(content)
            )
        else:
            raise RowError(f"turn {number}: 'content' must be a string or a list of parts, not {shown(content)}")
        if role != "user" and any(not isinstance(p, Text) for p in parts):
            raise RowError(f"turn {number}: the {role}'s turn has an image or a video; only user turns can")
        return Message(ROLES[role], parts, is_trained(turn, number))

    def _part(self, part: Any, name: str, listed: list[Media], unused: list[Media], place: Place) -> Part:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in TEXTS:
            if not isinstance(part.get("text"), str):
                raise RowError(f"{name}: 'text' must be a string, not {shown(part.get('text'))}")
            return Text(part["text"])
        if not isinstance(kind, str) or kind not in MEDIA:
            raise RowError(f"{name}: 'type' is {shown(kind)}; known: {', '.join((*TEXTS, *MEDIA))}")
        cls = MEDIA[kind]
        keys = (kind, "image" if cls is Image else "video", "image_url" if cls is Image else "video_url", "path", "url")
        value = next((part[key] for key in keys if part.get(key) is not None), None)
        value = value.get("url") if isinstance(value, dict) else value
        if value is not None:
            return place.image(value) if cls is Image else place.video(value)
        index = part.get("index")
        if isinstance(index, int) and 0 <= index < len(listed) and isinstance(listed[index], cls):
            medium: Media | None = listed[index]
        else:
            medium = next((m for m in unused if isinstance(m, cls)), None)
        if medium is None:
            raise RowError(f"{name}: names no file, and the row's 'images'/'videos' have none left")
        if medium in unused:
            unused.remove(medium)
        return medium
