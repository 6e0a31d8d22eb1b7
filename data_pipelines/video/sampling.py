"""Which frames of a video to look at: pure functions from counts to indices."""

from __future__ import annotations


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
