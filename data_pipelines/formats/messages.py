"""OpenAI's chat messages: `content` a string, or a list of parts `text`, `image_url`, `image`, `video`.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                                {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}]}

A row is the object, or the bare list. A part without a file of its own takes the next of the row's `images`/`videos`
(or the one at its `index`), as TRL's vision sets have it; `train: false` or `weight: 0` on a turn: it is read, and not
learnt. Source:
https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from typing import Any

from data_pipelines.formats.registry import DATASET_FORMATS, Format, Place, shown
from data_pipelines.formats.turns import Media, check, check_unread, lead, learnt, listed_media, split
from data_pipelines.rows import RowError
from data_pipelines.samples import Image, Message, Part, Role, Sample, Text, Video

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXTS = ("text", "input_text", "output_text")
MEDIA = {"image": Image, "image_url": Image, "input_image": Image}
MEDIA |= {"video": Video, "video_url": Video, "input_video": Video}  # type: ignore[dict-item]


@DATASET_FORMATS.register("messages")
class Messages(Format):
    """OpenAI's chat messages: `content` a string, or a list of parts."""

    @classmethod
    def fits(cls, row: dict[str, Any]) -> bool:
        return isinstance(row.get("messages"), list)

    def parse(self, row: Any, place: Place) -> Sample:
        row = {"messages": row} if isinstance(row, list) else row
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
            raise RowError("'messages' must be a list with at least one turn")
        beside = listed_media(row, place)
        left = list(beside)
        messages = [self._message(turn, number, beside, left, place) for number, turn in enumerate(row["messages"])]
        messages = lead(messages, left)
        check(messages)
        if all(isinstance(part, Text) for message in messages for part in message.parts):
            check_unread(row)
        return place.sample(messages, row.get("category"))

    def _message(self, turn: Any, number: int, beside: list[Media], left: list[Media], place: Place) -> Message:
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(f"turn {number}: 'role' is {shown(role)}; known: {', '.join(ROLES)}")
        if turn.get("tool_calls"):
            raise RowError(f"turn {number}: 'tool_calls' cannot be trained here; leave such rows out")
        content = turn.get("content")
        parts: tuple[Part, ...]
        if isinstance(content, str):
            parts = split(content, left) if role == "user" and beside else (Text(content),)
        elif isinstance(content, list):
            parts = tuple(
                self._part(part, f"turn {number}, part {i}", beside, left, place) for i, part in enumerate(content)
            )
        else:
            raise RowError(f"turn {number}: 'content' must be a string or a list of parts, found {shown(content)}")
        if role != "user" and any(not isinstance(p, Text) for p in parts):
            raise RowError(f"turn {number}: the {role}'s turn shows a picture or a video; only the user's can")
        return Message(ROLES[role], parts, learnt(turn, number))

    def _part(self, part: Any, name: str, beside: list[Media], left: list[Media], place: Place) -> Part:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in TEXTS:
            if not isinstance(part.get("text"), str):
                raise RowError(f"{name}: 'text' must be a string, found {shown(part.get('text'))}")
            return Text(part["text"])
        if not isinstance(kind, str) or kind not in MEDIA:
            raise RowError(f"{name}: 'type' is {shown(kind)}; known: {', '.join((*TEXTS, *MEDIA))}")
        cls = MEDIA[kind]
        keys = (kind, "image" if cls is Image else "video", "image_url" if cls is Image else "video_url", "path", "url")
        value = next((part[key] for key in keys if part.get(key) is not None), None)
        value = value.get("url") if isinstance(value, dict) else value
        if value is not None:
            if isinstance(value, str):
                value = value.removeprefix("file://")
            return place.image(value) if cls is Image else place.video(value)
        index = part.get("index")
        if isinstance(index, int) and 0 <= index < len(beside) and isinstance(beside[index], cls):
            found: Media | None = beside[index]
        else:
            found = next((f for f in left if isinstance(f, cls)), None)
        if found is None:
            raise RowError(f"{name}: names no file, and the row's 'images'/'videos' hold no other")
        if found in left:
            left.remove(found)
        return found
