"""Which tokens belong to the assistant: from characters of the rendered text to tokens, and across expanded media."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, product

from data_pipelines.samples import Sample, SampleError

Spans = Sequence[tuple[int, int]]

MAX_MERGED = 2  # tokens at each end of a text between media that may change when the media are expanded


def supervised_turns(sample: Sample) -> set[int]:
    """Return the numbers of the assistant turns to train on, counted from 1.

    Excludes turns with `train=False` and empty ones, which would train the model to answer nothing. Raises SampleError
    if no turn remains.
    """
    answers = [message for message in sample.messages if message.role == "assistant"]
    wanted = {turn for turn, message in enumerate(answers, start=1) if message.train}
    supervised = {turn for turn in wanted if answers[turn - 1].text.strip()}
    if not supervised:
        why = "none of its assistant turns is to be trained" if answers else "it has no assistant turn"
        why = "its answer is empty" if wanted else why
        raise SampleError(sample.id, sample.source, f"no answer to train on: {why}", "encode")
    return supervised


def assign_turns(offsets: Spans, spans: Spans) -> list[int]:
    """Return, for each token's characters, the number of the span that contains them, from 1; 0 for none.

    Both arguments are in ascending order. A token without characters, such as one that the tokenizer adds, is in no
    span.
    """
    turns = [0] * len(offsets)
    for token, span in _overlaps(offsets, spans):
        (start, end), (low, high) = offsets[token], spans[span]
        if low <= start and end <= high:
            turns[token] = span + 1
    return turns


def overlapping(offsets: Spans, spans: Spans) -> list[bool]:
    """Return, for each token's characters, whether any of them lies inside one of the spans."""
    flags = [False] * len(offsets)
    for token, _ in _overlaps(offsets, spans):
        flags[token] = True
    return flags


def _overlaps(offsets: Spans, spans: Spans) -> Iterator[tuple[int, int]]:
    """Iterate over the tokens with characters inside a span, each with the first such span, in one pass over both."""
    span = 0
    for token, (start, end) in enumerate(offsets):
        while span < len(spans) and spans[span][1] <= start:
            span += 1
        if span == len(spans):
            return
        if spans[span][0] < end and start < end:
            yield token, span


def align(
    plain: Sequence[int], turns: Sequence[int], is_media: Sequence[bool], expanded: list[int]
) -> list[int] | None:
    """Return the turn (0 for none) of each token of `expanded`, given the `turns` of the tokens of `plain`.

    `expanded` is `plain` with every media placeholder (`is_media`) replaced by a run of tokens. A run may hold text,
    such as the times of frames, and the text beside it may merge with its ends into other tokens. Returns None if an
    answer is not found.
    """
    aligned = [0] * len(expanded)
    at = 0
    for media, group in groupby(zip(plain, turns, is_media, strict=True), key=lambda token: token[2]):
        segment = list(group)
        answers = [i for i, token in enumerate(segment) if token[1]]
        if media or not answers:
            continue
        start = _locate([token[0] for token in segment], answers, expanded, at)
        if start is None:
            return None
        for i in answers:
            aligned[start + i] = segment[i][1]
        at = start + answers[-1] + 1
    return aligned


def _locate(tokens: list[int], answers: list[int], expanded: list[int], at: int) -> int | None:
    """Return where the text begins in `expanded`, with as few merged tokens at its ends as possible."""
    for low, high in sorted(product(range(MAX_MERGED + 1), repeat=2), key=sum):
        if low <= answers[0] and answers[-1] < len(tokens) - high:
            start = _find(tokens[low : len(tokens) - high], expanded, at)
            if start is not None:
                return start - low
    return None


def _find(wanted: list[int], tokens: list[int], at: int) -> int | None:
    """Return the first position from `at` on where `tokens` continues with `wanted`."""
    last = len(tokens) - len(wanted) + 1
    try:
        while True:
            at = tokens.index(wanted[0], at, last)  # skips the hundreds of tokens of an image at once
            if tokens[at : at + len(wanted)] == wanted:
                return at
            at += 1
    except ValueError:
        return None
