"""What a video costs to load: ours, limits and all, beside what the same machine does at best and at worst.

    python benchmarks/video_decode.py --out benchmarks/results/video-decode.json

`over_decord`: frames a second as a multiple of a bare decord reader's `get_batch` with the same indices; `over_walk`:
as a multiple of decoding from the start with PyAV, which is what a loader does that cannot seek. Both sides of a ratio
are timed in turn, in every round; the figures are medians of the rounds' ratios. `apart`: in a process that can be
killed (`data.video.timeout`, the default); `here`: without.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
from machine import processor_name
from PIL import Image

from data_pipelines.video import load_video
from mmdora.config import VideoConfig

# name: (width, height), frames of the clip, frames to take
CLIPS = {
    "320p, 8 of 300": ((426, 320), 300, 8),
    "320p, 32 of 300": ((426, 320), 300, 32),
    "720p, 8 of 300": ((1280, 720), 300, 8),
    "320p, 8 of 9000": ((426, 320), 9000, 8),
}
WAYS = {
    "decord, apart": VideoConfig(reader="decord"),
    "decord, here": VideoConfig(reader="decord", timeout=None),
    "pyav, apart": VideoConfig(reader="pyav"),
    "pyav, here": VideoConfig(reader="pyav", timeout=None),
}


def write_clip(path: Path, size: tuple[int, int], frames: int) -> None:
    """A window that moves over a picture twice its size, in H.264 with x264's usual distance of keyframes."""
    width, height = size
    coarse = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(coarse).resize((2 * width, 2 * height)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            x, y = int((np.sin(i / 40) + 1) / 2 * width), int((np.cos(i / 55) + 1) / 2 * height)
            pixels = np.ascontiguousarray(wide[y : y + height, x : x + width])
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def bare_decord(path: Path, indices: list[int]) -> None:
    reader = decord.VideoReader(str(path), num_threads=1)
    reader.get_batch(indices).asnumpy()
    reader.seek(0)


def walk(path: Path, indices: list[int]) -> None:
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = container.decode(video=0)
        until = zip(range(indices[-1] + 1), frames, strict=False)
        np.stack([frame.to_ndarray(format="rgb24") for i, frame in until if i in indices])


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(path: Path, count: int, rounds: int, walks: bool) -> dict[str, dict[str, float]]:
    """The figures of one clip, by way of reading."""
    figures = {}
    for name, base in WAYS.items():
        config = base.model_copy(update={"num_frames": count})
        indices = list(load_video(path, config).indices)  # the child is started, the file in the page cache
        rows = [
            (
                seconds(lambda: load_video(path, config)),  # noqa: B023  (called at once)
                seconds(lambda: bare_decord(path, indices)),  # noqa: B023
                seconds(lambda: walk(path, indices)) if walks else 0.0,  # noqa: B023
            )
            for _ in range(rounds)
        ]
        figures[name] = {
            "ms": round(1000 * statistics.median(row[0] for row in rows), 1),
            "over_decord": round(statistics.median(row[1] / row[0] for row in rows), 3),
        }
        if walks:
            figures[name]["over_walk"] = round(statistics.median(row[2] / row[0] for row in rows), 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=CLIPS, metavar="NAME", help="some of the clips")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, frames, count) in CLIPS.items():
            if args.only and name not in args.only:
                continue
            path = Path(folder) / "clip.mp4"
            write_clip(path, size, frames)
            figures[name] = measure(path, count, args.rounds, walks=frames > 1000)
            print(name, figures[name], flush=True)
    report = {
        "date": datetime.date.today().isoformat(),
        "hardware": processor_name(),
        "versions": {m.__name__: m.__version__ for m in (av, decord, np)},
        "rounds": args.rounds,
        "figures": figures,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
