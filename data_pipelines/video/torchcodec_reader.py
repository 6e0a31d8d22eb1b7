"""TorchCodec: PyTorch's own reader, where it is installed (`pip install mmdora[torchcodec]`) and finds FFmpeg's
libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.samples import MediaError
from data_pipelines.video.packets import read_packets
from data_pipelines.video.registry import VIDEO_READERS


@VIDEO_READERS.register("torchcodec")
def open_torchcodec(path: Path) -> TorchCodecFile:
    """What FFmpeg's shared libraries on this machine read; refuses what TorchCodec does not read exactly."""
    return TorchCodecFile(path)


class TorchCodecFile:
    """The frames by TorchCodec in its exact mode; their times by PyAV, since TorchCodec tells them only of decoded
    ones."""

    def __init__(self, path: Path):
        import av
        from torchcodec.decoders import VideoDecoder

        with av.open(str(path)) as container:
            packets = read_packets(container, container.streams.video[0]) if container.streams.video else None
        # Found against a walk from the start: it loses frames in MPEG streams, and turns odd or deep pixels otherwise.
        if packets is None or not packets.seekable or not packets.same_colours:
            raise MediaError(path, "torchcodec cannot read it exactly; data.video.reader: pyav can")
        self.timeline = packets.timeline
        self._decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 [len(indices), height, width, 3]."""
        return self._decoder.get_frames_at(list(indices)).data.numpy()

    def close(self) -> None:
        del self._decoder
