"""The common form of all dataset formats: a sample is a conversation whose messages hold text, images and videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from mmdora.core.errors import UserError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True)
class Image:
    """An image file. If it lies inside a shard or a table, `data` holds the file's bytes and `path` only names it."""

    path: Path
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Video:
    """A video file (`path` and `data` as in Image), or the span of it from `start` up to `end`.

    `start` and `end` are in seconds; None stands for the first and the last frame. `frames_fps` is the frame rate of a
    directory of images. These values override `data.video`.
    """

    path: Path
    data: bytes | None = field(default=None, repr=False)
    start: float | None = None
    end: float | None = None
    frames_fps: float | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """The values of `start`, `end` and `frames_fps` that are given, keyed as in `data.video`."""
        named = {"start": self.start, "end": self.end, "frames_fps": self.frames_fps}
        return {name: value for name, value in named.items() if value is not None}


Part: TypeAlias = Text | Image | Video


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `train` says whether an assistant's turn is trained on; the others never are."""

    role: Role
    parts: tuple[Part, ...]
    train: bool = True

    @property
    def text(self) -> str:
        """The text parts, concatenated."""
        return "".join(p.text for p in self.parts if isinstance(p, Text))


@dataclass(frozen=True)
class Sample:
    """One conversation.

    `id` is unique inside `source`, the file that the sample was read from. `category` is the dataset's own label.
    `answers` are the answers of all annotators, if there are several; the conversation holds only one of them.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    category: str | None = None
    answers: tuple[str, ...] = ()

    def media(self) -> Iterator[Image | Video]:
        """Iterate over the images and videos in the order of the conversation."""
        for message in self.messages:
            for part in message.parts:
                if not isinstance(part, Text):
                    yield part


@dataclass(frozen=True)
class Rejected:
    """A row that is not a valid sample. It is recorded in the ledger, and the rest of the file is read."""

    id: str
    source: str
    reason: str
    media: str | None = None


class SampleError(UserError):
    """A sample that cannot be used. `stage` is where the problem was found, `media` the file at fault, if any."""

    def __init__(self, sample_id: str, source: str, reason: str, stage: str, media: str | None = None):
        super().__init__(f"sample {sample_id!r} of {source}: {reason}")
        self.sample_id, self.source, self.reason, self.stage, self.media = (
            sample_id,
            source,
            reason,
            stage,
            media,
        )


class MediaError(UserError):
    """An image or video file that cannot be read. The message names the file and the reason."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason
