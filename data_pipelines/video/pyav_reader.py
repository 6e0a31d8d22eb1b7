"""PyAV: FFmpeg's own decoders, on every platform; reads AV1 and GIF, which decord does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipelines.samples import MediaError
from data_pipelines.video.registry import VIDEO_READERS, VideoClip
from data_pipelines.video.sampling import uniform_indices


@VIDEO_READERS.register("pyav")
def read_pyav(path: Path, num_frames: int) -> VideoClip:
    """`num_frames` frames at equal steps, by decoding the file from its start. Raises MediaError that names the
    file."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(path, "the file has no video stream")
            stream = container.streams.video[0]
            total = stream.frames or sum(1 for _ in container.decode(stream))
            if total < 1:
                raise MediaError(path, "the video has no frames")
            container.seek(0)
            wanted = uniform_indices(total, num_frames)
            pictures = {}
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted:
                    pictures[index] = frame.to_ndarray(format="rgb24")
                if index >= wanted[-1]:
                    break
            missing = sorted(set(wanted) - set(pictures))
            if missing:
                raise MediaError(path, f"frame {missing[0]} of {total} cannot be decoded")
            rate = float(stream.average_rate or 0)
            return VideoClip(np.stack([pictures[i] for i in wanted]), tuple(wanted), rate, total)
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(path, f"FFmpeg cannot decode it ({error})") from error
