"""Which tokens the assistant says: from characters of the rendering to tokens, and over the expanded media."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, product

from data_pipelines.samples import Sample, SampleError

Spans = Sequence[tuple[int, int]]


def learnt_turns(sample: Sample) -> set[int]:
    """Which of the assistant's turns are learnt, counted from 1: not those that are only to be read, nor one without
    words, which would teach to say nothing. Raises SampleError where there are none."""
    answers = [message for message in sample.messages if message.role == "assistant"]
    wanted = {turn for turn, message in enumerate(answers, start=1) if message.train}
    learnt = {turn for turn in wanted if answers[turn - 1].text.strip()}
    if not learnt:
        why = "no assistant turn of it is to be learnt" if answers else "it has no assistant turn"
        why = "its answer is empty" if wanted else why
        raise SampleError(sample.id, sample.source, f"no answer to learn: {why}", "encode")
    return learnt


def turns_of(offsets: Spans, spans: Spans) -> list[int]:
    """For each token's characters, which span they lie inside, counted from 1; 0 for none.

    Both run from left to right; a token without characters, as one that the tokenizer adds, is in none.
    """
    turns = [0] * len(offsets)
    for place, turn in _beside(offsets, spans):
        (start, end), (low, high) = offsets[place], spans[turn]
        if low <= start and end <= high:
            turns[place] = turn + 1
    return turns


def touching(offsets: Spans, spans: Spans) -> list[bool]:
    """For each token's characters, whether any lies inside one of the spans."""
    touches = [False] * len(offsets)
    for place, _ in _beside(offsets, spans):
        touches[place] = True
    return touches


def _beside(offsets: Spans, spans: Spans) -> Iterator[tuple[int, int]]:
    """The tokens that have characters inside a span, each with the first such span; one pass over both."""
    turn = 0
    for place, (start, end) in enumerate(offsets):
        while turn < len(spans) and spans[turn][1] <= start:
            turn += 1
        if turn == len(spans):
            return
        if spans[turn][0] < end and start < end:
            yield place, turn


def align(plain: Sequence[int], turns: Sequence[int], cut: Sequence[bool], expanded: list[int]) -> list[int] | None:
    """For each token of `expanded`, whose turn it is (0: nobody's), given that for each token of `plain`.

    `expanded` is `plain` with every media placeholder (`cut`) replaced by a run, which may hold text, as the times of
    frames, and whose ends may melt into one token with the text beside it. None where an answer is not found.
    """
    found = [0] * len(expanded)
    at = 0
    for is_media, group in groupby(zip(plain, turns, cut, strict=True), key=lambda token: token[2]):
        segment = list(group)
        answers = [place for place, token in enumerate(segment) if token[1]]
        if is_media or not answers:
            continue
        start = _place([token[0] for token in segment], answers, expanded, at)
        if start is None:
            return None
        for place in answers:
            found[start + place] = segment[place][1]
        at = start + answers[-1] + 1
    return found


MELTED = 2  # tokens at each end of a text between media that may be others once these are expanded


def _place(tokens: list[int], answers: list[int], expanded: list[int], at: int) -> int | None:
    """Where the text begins in `expanded`, with as few melted ends as can be."""
    for low, high in sorted(product(range(MELTED + 1), repeat=2), key=sum):
        if low <= answers[0] and answers[-1] < len(tokens) - high:
            start = _find(tokens[low : len(tokens) - high], expanded, at)
            if start is not None:
                return start - low
    return None


def _find(wanted: list[int], within: list[int], at: int) -> int | None:
    """The first place from `at` on where `wanted` stands in a row."""
    last = len(within) - len(wanted) + 1
    try:
        while True:
            at = within.index(wanted[0], at, last)  # past a picture's hundreds of tokens at once
            if within[at : at + len(wanted)] == wanted:
                return at
            at += 1
    except ValueError:
        return None
