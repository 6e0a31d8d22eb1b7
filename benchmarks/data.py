"""How fast samples are made ready, against what no loader of the same machine can do without.

    python benchmarks/data.py --out benchmarks/results/data.json

One thread; every round times all candidates in a new order; medians, and ratios of one run, since the machine is noisy.
- `images`: a JPEG with a question and its answer, encoded for a LLaVA-1.5 (336 px), as a DataLoader's worker hands it
  over. The limit is Pillow's decoding and the processor alone, on a text that is rendered already; it makes no
  labels. `memory kept`: by what we set where a worker starts (mmdora/training/loader_workers.py).
- `conversations`: a question and its answer, encoded. Beside both: the way of LLaVA's own loader
  (LazySupervisedDataset), written down from what it does: open, pad to a square, preprocess, fill in a conversation
  template, tokenize it whole, and the question once more to find what is learnt.
- `frames`: at equal steps of a clip. The limit is a bare decord reader's `get_batch` of the same frames; of long clips,
  the other side is decoding from the start. `apart`: in a process that can be killed. The default is
  `pyav, apart`.
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
from llava import ANSWER, QUESTION, make_processor, write_pictures
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

PICTURES = 320  # a candidate makes ready in one round
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


def timed(candidates: Candidates, rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    for candidate in candidates.values():
        candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in random.sample(list(candidates), len(candidates)):
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compared(seconds: dict[str, float], count: int, to: str) -> dict[str, dict[str, float]]:
    """Each candidate's things a second, and that as a multiple of another's."""
    return {
        name: {"a_second": round(count / value, 1), f"over {to}": round(seconds[to] / value, 3)}
        for name, value in seconds.items()
    }


def sample(number: int, path: Path | None = None) -> Sample:
    media = () if path is None else (Image(path),)
    turns = (Message("user", (*media, Text(QUESTION))), Message("assistant", (Text(f"{ANSWER} {number}"),)))
    return Sample(str(number), turns, "benchmark")


def llava_way(processor: LlavaProcessor, number: int, path: Path | None = None) -> dict[str, torch.Tensor]:
    """One sample as LLaVA's loader prepares it, with the same tokenizer and image processor."""
    encoded = {}
    if path is not None:
        picture = PILImage.open(path).convert("RGB")
        side = max(picture.size)
        square = PILImage.new("RGB", (side, side), tuple(int(255 * m) for m in processor.image_processor.image_mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        encoded["pixel_values"] = processor.image_processor(square, return_tensors="pt")["pixel_values"]
    asked = f"USER: {'' if path is None else '<image>' + chr(10)}{QUESTION} ASSISTANT:"
    chunks = [processor.tokenizer(chunk)["input_ids"] for chunk in f"{asked} {ANSWER} {number}</s>".split("<image>")]
    ids = torch.tensor([token for chunk in chunks for token in (*chunk, -200)][:-1])
    labels = ids.clone()
    labels[: len(processor.tokenizer(asked)["input_ids"])] = IGNORED
    return encoded | {"input_ids": ids, "labels": labels}


class Pictures(Dataset[torch.Tensor]):
    """The pixel values of the same few pictures, made ready again and again."""

    def __init__(self, paths: Sequence[Path], prepare: Callable[[int, Path], Mapping[str, torch.Tensor]]):
        self.paths, self.prepare = paths, prepare

    def __len__(self) -> int:
        return PICTURES

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.prepare(number, self.paths[number % len(self.paths)])["pixel_values"]


def pictures_ready(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    processor, paths = make_processor(), write_pictures(folder)
    encoder = Encoder(processor)
    text = encoder.render(sample(0, paths[0]))

    def limit(number: int, path: Path) -> Mapping[str, torch.Tensor]:
        with PILImage.open(path) as picture:
            return processor(text=[text], images=[picture.convert("RGB")], return_tensors="pt")

    def ours(number: int, path: Path) -> Mapping[str, torch.Tensor]:
        return encoder.encode(sample(number, path))

    def theirs(number: int, path: Path) -> Mapping[str, torch.Tensor]:
        return llava_way(processor, number, path)

    def load(prepare: Callable[[int, Path], Mapping[str, torch.Tensor]], start: Callable[[int], None] | None) -> None:
        pictures = Pictures(paths, prepare)
        for _ in DataLoader(pictures, batch_size=8, num_workers=1, collate_fn=torch.cat, worker_init_fn=start):
            pass

    candidates: Candidates = {
        "limit": lambda: load(limit, None),
        "limit, memory kept": lambda: load(limit, start_worker),
        "mmdora": lambda: load(ours, start_worker),
        "mmdora, memory not kept": lambda: load(ours, None),
        "LLaVA's way": lambda: load(theirs, None),
    }
    return compared(timed(candidates, rounds), PICTURES, to="limit")


def conversations_ready(rounds: int) -> dict[str, dict[str, float]]:
    processor = make_processor()
    encoder = Encoder(processor)
    candidates: Candidates = {
        "mmdora": lambda: [encoder.encode(sample(number)) for number in range(200)],
        "LLaVA's way": lambda: [llava_way(processor, number) for number in range(200)],
    }
    return compared(timed(candidates, rounds), 200, to="LLaVA's way")


def write_clip(path: Path, size: tuple[int, int], frames: int) -> None:
    """A window that moves over a picture twice its size, in H.264 with x264's usual distance of keyframes."""
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


def walk(path: Path, indices: list[int]) -> None:
    """From the start, as a loader does that cannot seek."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        until = zip(range(indices[-1] + 1), container.decode(video=0), strict=False)
        np.stack([frame.to_ndarray(format="rgb24") for i, frame in until if i in indices])


def frames_ready(path: Path, clip: str, rounds: int) -> dict[str, dict[str, float]]:
    size, frames, count = CLIPS[clip]
    write_clip(path, size, frames)
    configs = {name: way.model_copy(update={"num_frames": count}) for name, way in WAYS.items()}
    indices = list(load_video(path, configs["decord, here"]).indices)
    candidates: Candidates = {name: (lambda c=config: load_video(path, c)) for name, config in configs.items()}
    candidates["bare decord"] = lambda: bare_decord(path, indices)
    if frames > 1000:
        candidates["from the start"] = lambda: walk(path, indices)
    seconds = timed(candidates, rounds)
    rows = compared(seconds, count, to="bare decord")
    for name in rows if frames > 1000 else ():
        rows[name]["over from the start"] = round(seconds["from the start"] / seconds[name], 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clips", nargs="*", choices=CLIPS, default=list(CLIPS), metavar="NAME", help="some of them")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = {"images": pictures_ready(Path(folder), args.rounds)}
        figures["conversations"] = conversations_ready(4 * args.rounds)  # short, so they vary more
        for clip in args.clips:
            figures[f"frames, {clip}"] = frames_ready(Path(folder) / "clip.mp4", clip, args.rounds)
    for what, rows in figures.items():
        print(what)
        for name, row in rows.items():
            print(f"  {name:16} " + "   ".join(f"{key} {value:g}" for key, value in row.items()))
    if args.out is not None:
        result = about_machine() | {"rounds": args.rounds, "figures": figures}
        args.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
