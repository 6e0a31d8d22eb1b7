"""The times and the spacing of sampled frames, in the form that transformers' video processors read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipelines.video.registry import SampledVideo
from data_pipelines.video.sampling import TOLERANCE

CLOCK = 1000.0  # ticks per second


def video_metadata(video: SampledVideo) -> dict[str, Any]:
    """Return the fields of transformers' VideoMetadata, such that `frames_indices` / `fps` are the frames' true times.

    transformers has no field for times. If the file's frame rate varies, the metadata therefore describes a video of
    one frame per millisecond.
    """
    fps, indices, total = video.fps, video.indices, video.total_frames
    if any(abs(time - index / fps) > TOLERANCE for time, index in zip(video.times, indices, strict=True)):
        fps, indices = CLOCK, tuple(round(time * CLOCK) for time in video.times)
        total = max(round((video.duration or 0) * CLOCK), indices[-1] + 1)
    return {"total_num_frames": total, "fps": fps, "frames_indices": list(indices), "duration": video.duration}


def seconds_per_grid(key: str, videos: Sequence[SampledVideo], processor: Any) -> list[float] | None:
    """Return the seconds between the temporal patches of each video if the processor's output `key` holds these, else
    None. Processors compute them as if frames were sampled from the whole file, or at their own default rate."""
    if not key.removeprefix("video_").startswith("second_per_grid"):  # of Qwen2.5-VL, Qwen2.5-Omni and Qwen3-Omni
        return None
    frames: int = processor.video_processor.temporal_patch_size
    return [frames * video.spacing for video in videos]
