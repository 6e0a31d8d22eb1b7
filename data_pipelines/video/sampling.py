"""Which frames of a video to look at: pure functions from counts and times to indices."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

# Readers round the times of frames: one that is late by less than this is on time.
SLACK = 1e-3  # seconds


@dataclass(frozen=True)
class Sampling:
    """`data.video` as far as it chooses frames; mmdora.core.config.VideoConfig describes the keys."""

    num_frames: int = 8
    sampling: str = "uniform"
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    frames_fps: float | None = None


def choose_indices(wanted: Sampling, times: Sequence[float], keyframes: Sequence[int]) -> list[int]:
    """The frames that `wanted` asks for, of a file with frames at `times` (seconds). Raises ValueError where the span
    holds none."""
    span = clip_span(times, wanted.start, wanted.end)
    if wanted.sampling == "fps":
        assert wanted.fps is not None
        chosen = fps_indices(times[span.start : span.stop], wanted.fps, wanted.num_frames)
        return [span.start + i for i in chosen]
    if wanted.sampling == "keyframe":
        inside = [k for k in keyframes if k in span]
        if not inside:
            raise ValueError("the span from data.video.start to data.video.end holds no keyframe")
        return thinned(inside, wanted.num_frames)
    return [span.start + i for i in uniform_indices(len(span), wanted.num_frames)]


def uniform_indices(total_frames: int, num_frames: int) -> list[int]:
    """`num_frames` indices from the first to the last frame at equal steps; a shorter video repeats some of its own.

    >>> uniform_indices(8, 4)
    [0, 2, 5, 7]
    """
    if total_frames < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} frames of {total_frames}")
    if num_frames == 1:
        return [(total_frames - 1) // 2]
    # Integer arithmetic, rounded half up: the same indices on every machine.
    return [(2 * i * (total_frames - 1) + num_frames - 1) // (2 * (num_frames - 1)) for i in range(num_frames)]


def thinned(indices: Sequence[int], most: int) -> list[int]:
    """At most `most` of `indices`, at equal steps over them.

    >>> thinned([0, 10, 20, 30, 40], 3)
    [0, 20, 40]
    """
    return list(indices) if len(indices) <= most else [indices[i] for i in uniform_indices(len(indices), most)]


def fps_indices(times: Sequence[float], fps: float, most: int) -> list[int]:
    """The frame on show at every tick of a clock of `fps` ticks a second that starts with the first frame; at most
    `most` of them, thinned over the whole. A frame that stays for several ticks is taken once.

    >>> fps_indices([0, 0.25, 0.5, 0.75, 1.0, 1.25], 2, 8)
    [0, 2, 4]
    """
    ticks = int((times[-1] - times[0] + SLACK) * fps) + 1
    if ticks > 2 * len(times):  # more ticks than frames: every frame
        return thinned(range(len(times)), most)
    shown = (bisect_right(times, times[0] + tick / fps + SLACK) - 1 for tick in range(ticks))
    return thinned(list(dict.fromkeys(shown)), most)


def clip_span(times: Sequence[float], start: float | None, end: float | None) -> range:
    """The frames from `start` up to, not including, `end` (seconds; None: from the first, to the last); the one on show
    at `start` where the span is shorter than a frame. Raises ValueError where there are none.

    >>> clip_span([0, 0.5, 1, 1.5], 0.5, 1.5)
    range(1, 3)
    >>> clip_span([0, 0.5, 1, 1.5], 0.7, 0.8)
    range(1, 2)
    """
    low = 0 if start is None else bisect_left(times, start - SLACK)
    high = len(times) if end is None else bisect_left(times, end - SLACK)
    if 0 < low == high < len(times):
        low -= 1
    if low >= high:
        shown = f"{0.0 if start is None else start:g} s to {'its end' if end is None else f'{end:g} s'}"
        raise ValueError(f"it has no frame from {shown} (data.video.start and end); its last is at {times[-1]:.2f} s")
    return range(low, high)
