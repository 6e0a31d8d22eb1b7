"""Shorten samples that exceed `data.max_length`: drop the last turns first, then cut the end of the only answer.

Media are never cut: everything before the answer that is kept stays whole.
"""

from __future__ import annotations

from dataclasses import replace

from data_pipelines.samples import Sample, SampleError, Text


def without_last_answer(sample: Sample, supervised: set[int]) -> Sample | None:
    """Return the sample without its last question and answer, or None if no other answer is supervised.

    `supervised` are the numbers of the supervised assistant turns, counted from 1. Turns after the last supervised
    answer are dropped first, because they contribute nothing to the loss.
    """
    ends = [number for number, message in enumerate(sample.messages, start=1) if message.role == "assistant"]
    ends = ends[: max(supervised)]
    if ends[-1] == len(sample.messages):
        ends.pop()
    if not any(turn <= len(ends) for turn in supervised):
        return None
    return replace(sample, messages=sample.messages[: ends[-1]])


def check_cut(sample: Sample, first: int, length: int, limit: int) -> None:
    """Check that a sample that ends with its only supervised answer can be cut at `limit` tokens.

    `first` is the index of the answer's first token, `length` the number of tokens. Raises SampleError if nothing of
    the answer would remain, or if the answer holds media.
    """
    reason = None
    if first >= limit:
        reason = f"{first} of them come before the answer"
    elif any(not isinstance(part, Text) for part in sample.messages[-1].parts):
        reason = "its answer holds media, which cannot be cut"
    if reason is not None:
        reason = f"{length} tokens, over data.max_length {limit}; {reason}"
        raise SampleError(sample.id, sample.source, reason, "encode")
