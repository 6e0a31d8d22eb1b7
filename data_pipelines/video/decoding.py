"""Decode one video in this process: open it, select the frames, read them, close it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from data_pipelines.samples import MediaError
from data_pipelines.video.registry import VIDEO_READERS, SampledVideo, Timeline
from data_pipelines.video.sampling import Sampling, select_indices

MAX_PIXELS = 2**27  # per frame; as many as 16K video has
MAX_BYTES = 2**32  # of all selected frames of one video


def decode(path: Path, reader: str, sampling: Sampling) -> SampledVideo:
    """Read the frames that `sampling` selects with the reader of that name. Raises MediaError."""
    try:
        file = VIDEO_READERS[reader](path)
        try:
            timeline = _with_times(file.timeline, sampling)
            indices = select_indices(sampling, timeline.times, timeline.keyframes)
            _check_size(path, timeline.size, len(indices))
            frames = file.read(indices)
        finally:
            file.close()
    except MediaError:
        raise
    except Exception as error:  # decoders raise any exception; the run continues, and the ledger records the reason
        reason = str(error).strip().splitlines()
        raise MediaError(
            path, f"{reader} cannot decode it ({reason[-1] if reason else type(error).__name__})"
        ) from error
    total = len(timeline.times)
    return SampledVideo(
        frames,
        tuple(indices),
        timeline.fps,
        total,
        reader,
        times=tuple(timeline.times[i] for i in indices),
        duration=max(total / timeline.fps, timeline.times[-1]),
    )


def _with_times(timeline: Timeline, sampling: Sampling) -> Timeline:
    """Set times for frames that have none: `frames_fps` frames per second, or one."""
    if timeline.fps:
        return timeline
    fps = sampling.frames_fps or 1.0
    return dataclasses.replace(timeline, fps=fps, times=tuple(i / fps for i in range(len(timeline.times))))


def _check_size(path: Path, size: tuple[int, int], count: int) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise MediaError(path, f"frames of {width}×{height} pixels are too large to decode safely")
    if 3 * width * height * count > MAX_BYTES:
        gib = 3 * width * height * count / 2**30
        raise MediaError(
            path, f"{count} frames of {width}×{height} pixels take {gib:.1f} GiB; lower data.video.num_frames"
        )
