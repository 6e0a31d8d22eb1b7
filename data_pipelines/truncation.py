"""Over-long samples made shorter by rule: whole questions with their answers first, then the end of the one answer.

Media are never cut: what stands before the answer that is kept stays whole.
"""

from __future__ import annotations

from dataclasses import replace

from data_pipelines.samples import Sample, SampleError, Text


def without_last_answer(sample: Sample, learnt: set[int]) -> Sample | None:
    """The sample up to an earlier answer, its last question and answer left out; None where no other answer is learnt.

    `learnt` counts the assistant's turns from 1. What follows the last learnt answer goes first: it teaches nothing.
    """
    ends = [place for place, message in enumerate(sample.messages, start=1) if message.role == "assistant"]
    ends = ends[: max(learnt)]
    if ends[-1] == len(sample.messages):
        ends.pop()
    if not any(turn <= len(ends) for turn in learnt):
        return None
    return replace(sample, messages=sample.messages[: ends[-1]])


def check_cut(sample: Sample, first: int, length: int, limit: int) -> None:
    """Raise SampleError where a sample that ends with its one learnt answer, whose first token is `first` of `length`,
    cannot be cut at `limit`: nothing of the answer would stay, or media stand in it."""
    reason = None
    if first >= limit:
        reason = f"what comes before its answer takes {first} alone"
    elif any(not isinstance(part, Text) for part in sample.messages[-1].parts):
        reason = "and its answer holds media, which are not cut"
    if reason is not None:
        reason = f"{length} tokens, over data.max_length {limit}; {reason}"
        raise SampleError(sample.id, sample.source, reason, "encode")
