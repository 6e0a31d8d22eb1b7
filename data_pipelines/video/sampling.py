"""Frame sampling: pure functions from frame counts and times to frame indices."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 1e-3  # seconds; readers round the times of frames


@dataclass(frozen=True)
class Sampling:
    """The keys of `data.video` that select frames; mmdora.core.config.VideoConfig describes them."""

    num_frames: int = 8
    sampling: str = "uniform"
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    frames_fps: float | None = None


def select_indices(sampling: Sampling, times: Sequence[float], keyframes: Sequence[int]) -> list[int]:
    """Return the indices that `sampling` selects from frames at `times` (seconds). Raises ValueError if there are none
    between `start` and `end`."""
    span = frame_range(times, sampling.start, sampling.end)
    if sampling.sampling == "fps":
        assert sampling.fps is not None
        selected = fps_indices(times[span.start : span.stop], sampling.fps, sampling.num_frames)
        return [span.start + i for i in selected]
    if sampling.sampling == "keyframe":
        inside = [k for k in keyframes if k in span]
        if not inside:
            raise ValueError("it has no keyframe between data.video.start and data.video.end")
        return thin_out(inside, sampling.num_frames)
    return [span.start + i for i in uniform_indices(len(span), sampling.num_frames)]


def uniform_indices(total_frames: int, num_frames: int) -> list[int]:
    """Return `num_frames` evenly spaced indices from the first to the last frame; a shorter video repeats some.

    >>> uniform_indices(8, 4)
    [0, 2, 5, 7]
    """
    if total_frames < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} frames of {total_frames}")
    if num_frames == 1:
        return [(total_frames - 1) // 2]
    # Integer arithmetic, rounded half up: the same indices on every machine.
    return [(2 * i * (total_frames - 1) + num_frames - 1) // (2 * (num_frames - 1)) for i in range(num_frames)]


def thin_out(indices: Sequence[int], limit: int) -> list[int]:
    """Return at most `limit` of `indices`, evenly spaced.

    >>> thin_out([0, 10, 20, 30, 40], 3)
    [0, 20, 40]
    """
    return list(indices) if len(indices) <= limit else [indices[i] for i in uniform_indices(len(indices), limit)]


def fps_indices(times: Sequence[float], fps: float, limit: int) -> list[int]:
    """Return the frames that are visible every 1 / `fps` seconds from the first frame on; at most `limit`, evenly
    thinned out. A frame that is visible for several steps is returned once.

    >>> fps_indices([0, 0.25, 0.5, 0.75, 1.0, 1.25], 2, 8)
    [0, 2, 4]
    """
    steps = int((times[-1] - times[0] + TOLERANCE) * fps) + 1
    if steps > 2 * len(times):  # far more steps than frames: every frame
        return thin_out(range(len(times)), limit)
    visible = (bisect_right(times, times[0] + step / fps + TOLERANCE) - 1 for step in range(steps))
    return thin_out(list(dict.fromkeys(visible)), limit)


def frame_range(times: Sequence[float], start: float | None, end: float | None) -> range:
    """Return the frames from `start` up to but not including `end` (seconds; None for the first and the last frame). If
    the span is shorter than a frame, this is the frame visible at `start`. Raises ValueError if there is none.

    >>> frame_range([0, 0.5, 1, 1.5], 0.5, 1.5)
    range(1, 3)
    >>> frame_range([0, 0.5, 1, 1.5], 0.7, 0.8)
    range(1, 2)
    """
    low = 0 if start is None else bisect_left(times, start - TOLERANCE)
    high = len(times) if end is None else bisect_left(times, end - TOLERANCE)
    if 0 < low == high < len(times):
        low -= 1
    if low >= high:
        span = f"{0.0 if start is None else start:g} s to {'its end' if end is None else f'{end:g} s'}"
        raise ValueError(f"it has no frame from {span} (data.video.start and end); the last is at {times[-1]:.2f} s")
    return range(low, high)
