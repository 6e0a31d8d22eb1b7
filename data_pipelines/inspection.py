"""A look at data before it trains: what samples become and what is lost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from data_pipelines.encoding import IGNORED, Encoded, Encoder
from data_pipelines.ledger import Entry, from_change, from_error
from data_pipelines.samples import Part, Sample, SampleError, Text, Video
from mmdora.core.errors import UserError

FOLDED = 4  # tokens in a row from which on equal ones are folded: a picture's


@dataclass
class Look:
    """What the samples looked at became; lists are over those that can be used."""

    looked: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens
    supervised: list[int] = field(default_factory=list)  # of them, learnt
    kinds: list[tuple[int, int]] = field(default_factory=list)  # pictures and clips
    frames: list[int] = field(default_factory=list)  # as the vision encoder takes them: crops, and a clip's frames
    entries: list[Entry] = field(default_factory=list)  # what training would write to the ledger
    example: tuple[Sample, Encoded] | None = None

    @property
    def skipped(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.changed]


def look(
    samples: Sequence[Sample],
    encoder: Encoder,
    most: int,
    advance: Callable[[int], None],
    frames_in: Callable[[Encoded], int],
) -> Look:
    """Encode at most `most` samples, at equal steps over all of them, as training would."""
    found = Look()
    count = min(most, len(samples))
    for place in (i * len(samples) // count for i in range(count)):
        found.looked += 1
        advance(1)
        try:
            sample = samples[place]
            encoded = encoder.encode(sample, lambda why: found.entries.append(from_change(sample, why)))  # noqa: B023
        except SampleError as error:
            found.entries.append(from_error(error))
            continue
        labels = encoded["labels"][0]
        found.lengths.append(len(labels))
        found.supervised.append(int((labels != IGNORED).sum()))
        media = list(sample.media())
        clips = sum(isinstance(part, Video) for part in media)
        found.kinds.append((len(media) - clips, clips))
        found.frames.append(frames_in(encoded))
        found.frames.append(frames_in(encoded))
        if found.example is None or (media and not any(found.example[0].media())):
            found.example = (sample, encoded)
    return found


def spelled(encoder: Encoder, encoded: Encoded) -> list[tuple[str, bool]]:
    """An encoded sample as pieces of text, each with whether it is learnt; a picture's tokens are folded into one."""
    tokenizer = encoder.processor.tokenizer
    ids, labels = encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()
    pieces: list[tuple[str, bool]] = []
    waiting: list[int] = []
    for learnt, group in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        for token, run in groupby(token for token, _ in group):
            count = len(list(run))
            if count < FOLDED:
                waiting += [token] * count
                continue
            pieces += [(tokenizer.decode(waiting), learnt)] if waiting else []
            pieces.append((f"[{tokenizer.decode([token])} × {count}]", learnt))
            waiting = []
        pieces += [(tokenizer.decode(waiting), learnt)] if waiting else []
        waiting = []
    return pieces


def readable(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Those that can be read; the others are told elsewhere."""
    for place in range(len(samples)):
        try:
            yield samples[place]
        except UserError:
            continue


def repeated(samples: Iterable[Sample]) -> int:
    """How many samples say what an earlier one says, about the same files."""
    seen: set[bytes] = set()
    count = 0
    for sample in samples:
        count += 1
        said = [(message.role, [_named(part) for part in message.parts]) for message in sample.messages]
        seen.add(_digest(repr(said).encode("utf-8", "replace")))
    return count - len(seen)


def _named(part: Part) -> object:
    """The part, by its content where that lies in a shard: the path there is another in every row."""
    if isinstance(part, Text) or part.data is None:
        return part
    return type(part).__name__, _digest(part.data)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
