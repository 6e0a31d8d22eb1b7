"""TorchCodec: PyTorch's video reader. Needs the `torchcodec` extra and FFmpeg's shared libraries."""

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
    """Formats of the FFmpeg libraries on this machine; rejects files that TorchCodec does not read exactly."""
    return TorchCodecFile(path)


class TorchCodecFile:
    """Reads frames with TorchCodec in its exact mode, and their times with PyAV, because TorchCodec reports only those
    of decoded frames."""

    def __init__(self, path: Path):
        import av
        from torchcodec.decoders import VideoDecoder

        with av.open(str(path)) as container:
            packets = read_packets(container, container.streams.video[0]) if container.streams.video else None
        # Compared with sequential decoding, TorchCodec loses frames in MPEG streams, and converts odd sizes and pixels
        # of more than 8 bits to other RGB.
        if packets is None or not packets.seekable or not packets.same_colors:
            raise MediaError(path, "torchcodec cannot read it exactly; use data.video.reader=pyav")
        self.timeline = packets.timeline
        self._decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return frames, uint8 [len(indices), height, width, 3]."""
        return self._decoder.get_frames_at(list(indices)).data.numpy()

    def close(self) -> None:
        """Free the decoder."""
        del self._decoder
