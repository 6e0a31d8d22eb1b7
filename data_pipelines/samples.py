"""What every dataset format is read into: a sample is a conversation whose messages hold text, images and videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from mmdora.core.errors import UserError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Image:
    """A picture in a file, or in `data` (the file's bytes, from inside a shard), which `path` then only names."""

    path: Path
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Video:
    """As `Image`; or a clip of it, from `start` up to `end` (seconds; None: from its first frame, to its last).
    `frames_fps` is the rate of a directory of pictures. What is given here goes before `data.video`."""

    path: Path
    data: bytes | None = field(default=None, repr=False)
    start: float | None = None
    end: float | None = None
    frames_fps: float | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """Those that are given, by the name of their key in `data.video`."""
        named = {"start": self.start, "end": self.end, "frames_fps": self.frames_fps}
        return {name: value for name, value in named.items() if value is not None}


Part: TypeAlias = Text | Image | Video


@dataclass(frozen=True)
class Message:
    role: Role
    parts: tuple[Part, ...]
    train: bool = True  # of the assistant's: whether its words are learnt, or only read

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.parts if isinstance(p, Text))


@dataclass(frozen=True)
class Sample:
    """One conversation. `id` is unique inside its source, the file it was read from; `category` is the dataset's own
    label; `answers` are all that annotators gave, where they are several and the conversation can hold only one."""

    id: str
    messages: tuple[Message, ...]
    source: str
    category: str | None = None
    answers: tuple[str, ...] = ()

    def media(self) -> Iterator[Image | Video]:
        """Images and videos in the order in which the conversation shows them."""
        for message in self.messages:
            for part in message.parts:
                if not isinstance(part, Text):
                    yield part


@dataclass(frozen=True)
class Rejected:
    """A row that is no sample: it goes to the ledger with its reason, and the rest of the file is read on."""

    id: str
    source: str
    reason: str
    media: str | None = None


class SampleError(UserError):
    """A sample that cannot be used. Names the sample; `media` is the file at fault, if one is; `stage` where it came
    up."""

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
    """An image or video file that cannot be read. The message names the file and says why."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason
