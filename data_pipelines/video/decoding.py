"""One video decoded, in this process: open, choose the frames, read them, close."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from data_pipelines.samples import MediaError
from data_pipelines.video.registry import VIDEO_READERS, Timeline, VideoClip
from data_pipelines.video.sampling import Sampling, choose_indices

MAX_PIXELS = 2**27  # of a frame; 16K video has as many
MAX_BYTES = 2**32  # of all the frames taken from one video


def decode(path: Path, reader: str, wanted: Sampling) -> VideoClip:
    """The frames that `wanted` asks for, by the `reader` of that name. Raises MediaError."""
    try:
        file = VIDEO_READERS[reader](path)
        try:
            timeline = _with_clock(file.timeline, wanted)
            indices = choose_indices(wanted, timeline.times, timeline.keyframes)
            _check_size(path, timeline.size, len(indices))
            frames = file.read(indices)
        finally:
            file.close()
    except MediaError:
        raise
    except Exception as error:  # decoders raise whatever they like; the run goes on, and the ledger has the reason
        reason = str(error).strip().splitlines()
        raise MediaError(
            path, f"{reader} cannot decode it ({reason[-1] if reason else type(error).__name__})"
        ) from error
    return VideoClip(frames, tuple(indices), timeline.fps, len(timeline.times), reader)


def _with_clock(timeline: Timeline, wanted: Sampling) -> Timeline:
    """Frames that have no times of their own come at `frames_fps`, or one a second."""
    if timeline.fps:
        return timeline
    fps = wanted.frames_fps or 1.0
    return dataclasses.replace(timeline, fps=fps, times=tuple(i / fps for i in range(len(timeline.times))))


def _check_size(path: Path, size: tuple[int, int], count: int) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise MediaError(path, f"frames of {width}×{height} pixels are too large to decode safely")
    if 3 * width * height * count > MAX_BYTES:
        gib = 3 * width * height * count / 2**30
        raise MediaError(path, f"{count} frames of {width}×{height} take {gib:.1f} GiB; lower data.video.num_frames")
