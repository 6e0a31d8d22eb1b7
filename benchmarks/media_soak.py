"""Check that memory stays flat while workers read many images and videos, and that nothing leaks.

    python benchmarks/media_soak.py --out benchmarks/results/media-soak.json

2,000 videos and 20,000 images, interleaved, are read by 4 DataLoader workers, once forked and once spawned. Memory is
that of all processes, including the decoders, with shared pages counted once (PSS); `growth_mib` is the mean of the
last fifth of the run minus that of the second fifth (the first is warm-up). One video in a hundred is damaged.
Remaining processes, and file descriptors of this process, are counted after the loader is deleted.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
from machine import about_machine
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data_pipelines.images import load_image
from data_pipelines.samples import MediaError
from data_pipelines.video import isolation, load_video
from mmdora.core.config import VideoConfig
from mmdora.training.loader_workers import start_worker

CONFIG = VideoConfig(num_frames=8, timeout=60)
DAMAGED = 100  # one video in this many is damaged


class Media(Dataset[tuple[int, int, int]]):
    """Items are (1, 0, 0) for images, (0, 1, 0) for videos, (0, 0, 1) for rejected ones; videos are spread evenly."""

    def __init__(self, images: list[Path], videos: list[Path], damaged: Path, counts: tuple[int, int]):
        self.images, self.videos, self.damaged, self.counts = images, videos, damaged, counts

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        video = index * self.counts[1] // len(self)
        if (index + 1) * self.counts[1] // len(self) == video:
            load_image(self.images[index % len(self.images)])
            return 1, 0, 0
        try:
            load_video(self.damaged if video % DAMAGED == 0 else self.videos[video % len(self.videos)], CONFIG)
        except MediaError:
            return 0, 0, 1
        return 0, 1, 0


def make_files(folder: Path) -> tuple[list[Path], list[Path], Path]:
    """Write images of 640×480 pixels, videos of 320×240 in several codecs, and a damaged video."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)) for _ in range(16)]
    images = [folder / f"{i}.{suffix}" for i, suffix in enumerate(["jpg"] * 12 + ["png", "webp", "gif", "bmp"])]
    for path, image in zip(images, coarse, strict=True):
        image.resize((640, 480)).save(path)
    videos = []
    for name, codec in {"a.mp4": "libx264", "b.mkv": "libx264", "c.avi": "mpeg4", "d.webm": "libvpx-vp9"}.items():
        videos.append(folder / name)
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for i in range(48):
                pixels = np.asarray(coarse[i % 16].resize((320, 240)))
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
    damaged = folder / "damaged.mp4"
    damaged.write_bytes(videos[0].read_bytes()[:-500])
    return images, videos, damaged


def usage() -> tuple[float, int, int]:
    """Return the memory in MiB, file descriptors and number of this process and all its descendants."""
    memory = descriptors = count = 0
    this_process = psutil.Process()
    for process in [this_process, *this_process.children(recursive=True)]:
        try:
            full = process.memory_full_info()
            memory += getattr(full, "pss", full.rss)
            descriptors += process.num_fds()
            count += 1
        except psutil.Error:
            continue  # the process has just exited
    return memory / 2**20, descriptors, count


def soak(media: Media, start: str, workers: int) -> dict[str, Any]:
    """Run one pass and return its figures."""
    gc.collect()
    before = psutil.Process().num_fds()
    loader = DataLoader(
        media,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=start,
        worker_init_fn=start_worker,
    )
    samples: list[tuple[float, int, int]] = []
    counts = np.zeros(3, int)
    start_time = time.monotonic()
    for number, row in enumerate(loader):
        counts += np.asarray(row)
        if (number + 1) % max(1, len(media) // 50) == 0:
            samples.append(usage())
    seconds = time.monotonic() - start_time
    del loader
    gc.collect()
    isolation.stop()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _descendants():
        time.sleep(0.1)
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    memory = [statistics.mean(row[0] for row in rows) for rows in (early, late)]
    return {
        "images": int(counts[0]),
        "videos": int(counts[1]),
        "refused": int(counts[2]),
        "seconds": round(seconds, 1),
        "processes": max(row[2] for row in samples),
        "memory_mib": [round(row[0]) for row in samples[:: max(1, len(samples) // 10)]],
        "growth_mib": round(memory[1] - memory[0], 1),
        "growth_share": round(memory[1] / memory[0] - 1, 4),
        "descriptors_early_late": [max(row[1] for row in rows) for rows in (early, late)],
        "processes_left": len(_descendants()),
        "descriptors_left": psutil.Process().num_fds() - before,
    }


def _descendants() -> list[psutil.Process]:
    """Return the descendants of this process, except multiprocessing's resource tracker."""
    return [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        media = Media(*make_files(Path(folder)), (args.images, args.videos))
        # Start the resource tracker now: it lives as long as this process and must not count as a leak.
        torch.multiprocessing.get_context("spawn").Semaphore(1)
        figures = {start: soak(media, start, args.workers) for start in ("fork", "spawn")}
    report = about_machine() | {"workers": args.workers, "figures": figures}
    text = json.dumps(report, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
