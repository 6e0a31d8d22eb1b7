"""Inspect data before training: encode a few samples of a source and report what would be skipped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from data_pipelines.encoding import IGNORED, Encoded, Encoder
from data_pipelines.ledger import Entry, from_change, from_error
from data_pipelines.samples import Part, Sample, SampleError, Text, Video
from mmdora.core.errors import UserError

MIN_REPEATS = 4  # equal tokens in a row from which on they are shown as one piece, such as the tokens of an image


@dataclass
class Inspection:
    """The encoded samples of one source; lists are over the samples that can be used."""

    inspected: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens
    supervised: list[int] = field(default_factory=list)  # supervised tokens
    media: list[tuple[int, int]] = field(default_factory=list)  # images and videos
    frames: list[int] = field(default_factory=list)  # inputs of the vision encoder: image crops and video frames
    entries: list[Entry] = field(default_factory=list)  # what training would write to the ledger
    example: tuple[Sample, Encoded] | None = None

    @property
    def skipped(self) -> list[Entry]:
        """The entries of samples that cannot be used."""
        return [entry for entry in self.entries if not entry.changed]


def inspect_samples(
    samples: Sequence[Sample],
    encoder: Encoder,
    limit: int,
    advance: Callable[[int], None],
    count_frames: Callable[[Encoded], int],
) -> Inspection:
    """Encode at most `limit` evenly spaced samples as training would. `advance` moves a progress bar."""
    inspection = Inspection()
    entries = inspection.entries
    count = min(limit, len(samples))
    for position in (i * len(samples) // count for i in range(count)):
        inspection.inspected += 1
        advance(1)
        try:
            sample = samples[position]
            encoded = encoder.encode(sample, lambda why: entries.append(from_change(sample, why)))  # noqa: B023
        except SampleError as error:
            entries.append(from_error(error))
            continue
        labels = encoded["labels"][0]
        inspection.lengths.append(len(labels))
        inspection.supervised.append(int((labels != IGNORED).sum()))
        media = list(sample.media())
        videos = sum(isinstance(part, Video) for part in media)
        inspection.media.append((len(media) - videos, videos))
        inspection.frames.append(count_frames(encoded))
        if inspection.example is None or (media and not any(inspection.example[0].media())):
            inspection.example = (sample, encoded)
    return inspection


def decode_pieces(encoder: Encoder, encoded: Encoded) -> list[tuple[str, bool]]:
    """Decode an encoded sample into pieces of text, each with whether it is supervised. The tokens of an image become
    one piece, such as `[<image> × 576]`."""
    tokenizer = encoder.processor.tokenizer
    ids, labels = encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()
    pieces: list[tuple[str, bool]] = []
    pending: list[int] = []
    for supervised, group in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        for token, run in groupby(token for token, _ in group):
            count = len(list(run))
            if count < MIN_REPEATS:
                pending += [token] * count
                continue
            pieces += [(tokenizer.decode(pending), supervised)] if pending else []
            pieces.append((f"[{tokenizer.decode([token])} × {count}]", supervised))
            pending = []
        pieces += [(tokenizer.decode(pending), supervised)] if pending else []
        pending = []
    return pieces


def readable_samples(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Iterate over the samples that can be read; the caller reports the others."""
    for position in range(len(samples)):
        try:
            yield samples[position]
        except UserError:
            continue


def count_duplicates(samples: Iterable[Sample]) -> int:
    """Count the samples with the same text and the same media files as an earlier one."""
    digests: set[bytes] = set()
    count = 0
    for sample in samples:
        count += 1
        content = [(message.role, [_identity(part) for part in message.parts]) for message in sample.messages]
        digests.add(_digest(repr(content).encode("utf-8", "replace")))
    return count - len(digests)


def _identity(part: Part) -> object:
    """The part itself; media inside a shard by their content, because their path differs in every row."""
    if isinstance(part, Text) or part.data is None:
        return part
    return type(part).__name__, _digest(part.data)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
