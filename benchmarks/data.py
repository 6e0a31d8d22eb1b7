"""Measure how fast samples are prepared, against lower bounds for any data loader on the same machine.

    python benchmarks/data.py --out benchmarks/results/data.json

One thread. Every round times all candidates in a random order; figures are medians, and ratios within one run, since
timings are noisy.
- `images`: a JPEG with a question and its answer, encoded for LLaVA-1.5 (336 px) by a DataLoader worker. The limit is
  Pillow's decoding and the processor alone, on text that is already rendered, without labels. `memory kept`: with the
  allocator settings of mmdora's workers (mmdora/training/loader_workers.py).
- `conversations`: a question and its answer, encoded. Both are also compared with LLaVA's own loader
  (LazySupervisedDataset), reimplemented from its behaviour: open, pad to a square, preprocess, fill in a conversation
  template, tokenize it, and tokenize the question again to find the supervised tokens.
- `frames`: frames at equal intervals of a video. The limit is decord's `get_batch` of the same frames; long videos are
  also compared with decoding from the start. `apart`: in a process that can be killed. The default is `pyav, apart`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import av
import decord
import numpy as np
import torch
from llava import ANSWER, QUESTION, make_processor, write_images
from machine import about_machine
from PIL import Image as PILImage
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaProcessor

from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, Text
from data_pipelines.video import load_video
from mmdora.core.config import VideoConfig
from mmdora.training.loader_workers import start_worker

Candidates = dict[str, Callable[[], object]]

# name: (width, height), frames in the video, frames to sample
VIDEOS = {
    "320p, 8 of 300": ((426, 320), 300, 8),
    "320p, 32 of 300": ((426, 320), 300, 32),
    "720p, 8 of 300": ((1280, 720), 300, 8),
    "320p, 8 of 9000": ((426, 320), 9000, 8),
}
READERS = {
    "decord, apart": VideoConfig(reader="decord"),
    "decord, here": VideoConfig(reader="decord", timeout=None),
    "pyav, apart": VideoConfig(reader="pyav"),
    "pyav, here": VideoConfig(reader="pyav", timeout=None),
}


def time_candidates(candidates: Candidates, rounds: int) -> dict[str, float]:
    """Return the median seconds of each candidate."""
    for candidate in candidates.values():
        candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in random.sample(list(candidates), len(candidates)):
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(seconds: dict[str, float], count: int, to: str) -> dict[str, dict[str, float]]:
    """Return each candidate's items per second, and the ratio to the candidate `to`."""
    return {
        name: {"a_second": round(count / value, 1), f"over {to}": round(seconds[to] / value, 3)}
        for name, value in seconds.items()
    }


def sample(number: int, path: Path | None = None) -> Sample:
    media = () if path is None else (Image(path),)
    turns = (Message("user", (*media, Text(QUESTION))), Message("assistant", (Text(f"{ANSWER} {number}"),)))
    return Sample(str(number), turns, "benchmark")


def encode_like_llava(processor: LlavaProcessor, number: int, path: Path | None = None) -> dict[str, torch.Tensor]:
    """Prepare a sample like LLaVA's loader, with the same tokenizer and image processor."""
    encoded = {}
    if path is not None:
        image = PILImage.open(path).convert("RGB")
        side = max(image.size)
        square = PILImage.new("RGB", (side, side), tuple(int(255 * m) for m in processor.image_processor.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        encoded["pixel_values"] = processor.image_processor(square, return_tensors="pt")["pixel_values"]
    question = f"USER: {'' if path is None else '<image>' + chr(10)}{QUESTION} ASSISTANT:"
    chunks = [processor.tokenizer(chunk)["input_ids"] for chunk in f"{question} {ANSWER} {number}</s>".split("<image>")]
    ids = torch.tensor([token for chunk in chunks for token in (*chunk, -200)][:-1])
    labels = ids.clone()
    labels[: len(processor.tokenizer(question)["input_ids"])] = IGNORED
    return encoded | {"input_ids": ids, "labels": labels}


class Images(Dataset[torch.Tensor]):
    """The pixel values of a few images, prepared repeatedly, `count` in total."""

    def __init__(self, paths: Sequence[Path], count: int, prepare: Callable[[int, Path], Mapping[str, torch.Tensor]]):
        self.paths, self.count, self.prepare = paths, count, prepare

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.prepare(number, self.paths[number % len(self.paths)])["pixel_values"]


def measure_images(folder: Path, count: int, rounds: int) -> dict[str, dict[str, float]]:
    processor, paths = make_processor(), write_images(folder)
    encoder = Encoder(processor)
    text = encoder.render(sample(0, paths[0]))

    def limit(number: int, path: Path) -> Mapping[str, torch.Tensor]:
        with PILImage.open(path) as image:
            return processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")

    def encode(number: int, path: Path) -> Mapping[str, torch.Tensor]:
        return encoder.encode(sample(number, path))

    def encode_llava(number: int, path: Path) -> Mapping[str, torch.Tensor]:
        return encode_like_llava(processor, number, path)

    def load(prepare: Callable[[int, Path], Mapping[str, torch.Tensor]], start: Callable[[int], None] | None) -> None:
        images = Images(paths, count, prepare)
        for _ in DataLoader(images, batch_size=8, num_workers=1, collate_fn=torch.cat, worker_init_fn=start):
            pass

    candidates: Candidates = {
        "limit": lambda: load(limit, None),
        "limit, memory kept": lambda: load(limit, start_worker),
        "mmdora": lambda: load(encode, start_worker),
        "mmdora, memory not kept": lambda: load(encode, None),
        "LLaVA's way": lambda: load(encode_llava, None),
    }
    return compare(time_candidates(candidates, rounds), count, to="limit")


def measure_conversations(rounds: int) -> dict[str, dict[str, float]]:
    processor = make_processor()
    encoder = Encoder(processor)
    candidates: Candidates = {
        "mmdora": lambda: [encoder.encode(sample(number)) for number in range(200)],
        "LLaVA's way": lambda: [encode_like_llava(processor, number) for number in range(200)],
    }
    return compare(time_candidates(candidates, rounds), 200, to="LLaVA's way")


def write_video(path: Path, size: tuple[int, int], frames: int) -> None:
    """Write an H.264 video of a window that moves over a larger image, with x264's default keyframe interval."""
    width, height = size
    coarse = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    wide = np.asarray(PILImage.fromarray(coarse).resize((2 * width, 2 * height)))
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


def decode_from_start(path: Path, indices: list[int]) -> None:
    """Decode from the start, like a loader that cannot seek."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        until = zip(range(indices[-1] + 1), container.decode(video=0), strict=False)
        np.stack([frame.to_ndarray(format="rgb24") for i, frame in until if i in indices])


def measure_frames(path: Path, clip: str, rounds: int) -> dict[str, dict[str, float]]:
    size, frames, count = VIDEOS[clip]
    write_video(path, size, frames)
    configs = {name: reader.model_copy(update={"num_frames": count}) for name, reader in READERS.items()}
    indices = list(load_video(path, configs["decord, here"]).indices)
    candidates: Candidates = {name: (lambda c=config: load_video(path, c)) for name, config in configs.items()}
    candidates["bare decord"] = lambda: bare_decord(path, indices)
    if frames > 1000:
        candidates["from the start"] = lambda: decode_from_start(path, indices)
    seconds = time_candidates(candidates, rounds)
    rows = compare(seconds, count, to="bare decord")
    for name in rows if frames > 1000 else ():
        rows[name]["over from the start"] = round(seconds["from the start"] / seconds[name], 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=320, help="images per candidate and round")
    parser.add_argument(
        "--clips", nargs="*", choices=VIDEOS, default=list(VIDEOS), metavar="NAME", help="only these videos"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = {"images": measure_images(Path(folder), args.images, args.rounds)}
        figures["conversations"] = measure_conversations(4 * args.rounds)  # short, so they vary more
        for clip in args.clips:
            figures[f"frames, {clip}"] = measure_frames(Path(folder) / "clip.mp4", clip, args.rounds)
    for section, rows in figures.items():
        print(section)
        for name, row in rows.items():
            print(f"  {name:16} " + "   ".join(f"{key} {value:g}" for key, value in row.items()))
    if args.out is not None:
        result = about_machine() | {"rounds": args.rounds, "figures": figures}
        args.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
