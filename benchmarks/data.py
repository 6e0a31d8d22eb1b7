"""How fast samples are made ready, against the limit of the same machine: what no loader can do without.

    python benchmarks/data.py

One thread, interleaved rounds, medians; ratios of one run count, since the machine is noisy.
- images: a JPEG with a question and its answer, encoded for a LLaVA-1.5 (336 px). The limit is Pillow's decoding and
  the image processor alone. Beside it, the way of LLaVA's own loader (LazySupervisedDataset), written down here from
  what it does: open, pad to a square, preprocess, fill in a conversation template, tokenize it whole and then turn by
  turn to find what is learnt.
- text: conversations of one turn, encoded; the same way of LLaVA's beside it.
- video: frames at equal steps of an H.264 clip. The limit is decord's own `get_batch` of the same frames; and a sparse
  sample of a long clip, against decoding it from the start.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from adapter_step import about_machine
from PIL import Image as PILImage
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, Text
from data_pipelines.video import load_video
from data_pipelines.video.sampling import uniform_indices
from mmdora.config import VideoConfig, find_path

QUESTION, ANSWER = "What is on the table beside the window?", "A blue vase with yellow tulips."
SEPARATORS = (" ASSISTANT:", "</s>")


def processor() -> LlavaProcessor:
    tokenizer = AutoTokenizer.from_pretrained(find_path("assets/tiny-llava"))
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=find_path("assets/vicuna_v1.jinja").read_text(encoding="utf-8"),
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def sample(path: Path | None, number: int) -> Sample:
    media = () if path is None else (Image(path),)
    turns = (Message("user", (*media, Text(QUESTION))), Message("assistant", (Text(f"{ANSWER} {number}"),)))
    return Sample(str(number), turns, "benchmark")


def llava_way(prepared: LlavaProcessor, path: Path | None, number: int) -> dict[str, torch.Tensor]:
    """What LLaVA's LazySupervisedDataset does for one sample, with the same tokenizer and image processor."""
    encoded = {}
    text = f"USER: {QUESTION} ASSISTANT: {ANSWER} {number}</s>"
    if path is not None:
        text = f"USER: <image>\n{QUESTION} ASSISTANT: {ANSWER} {number}</s>"
        picture = PILImage.open(path).convert("RGB")
        side = max(picture.size)
        square = PILImage.new("RGB", (side, side), tuple(int(255 * m) for m in prepared.image_processor.image_mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        encoded["pixel_values"] = prepared.image_processor(square, return_tensors="pt")["pixel_values"]
    chunks = [prepared.tokenizer(chunk)["input_ids"] for chunk in text.split("<image>")]
    ids = torch.tensor([token for chunk in chunks for token in (*chunk, -200)][:-1])
    labels, at = ids.clone(), 1
    for turn in text.split(SEPARATORS[1])[:-1]:
        length = len(prepared.tokenizer(turn)["input_ids"])
        asked = len(prepared.tokenizer(turn.split(SEPARATORS[0])[0] + SEPARATORS[0])["input_ids"])
        labels[at : at + asked] = IGNORED
        at += length
    labels[at:] = IGNORED
    return encoded | {"input_ids": ids, "labels": labels}


def write_clip(path: Path, frames: int, size: tuple[int, int]) -> Path:
    """A clip of moving noise, with a keyframe every 48 frames."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"g": "48"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            picture = PILImage.fromarray(np.roll(noise, i, 1)).resize(size)
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def raw_decord(path: Path, count: int) -> int:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return len(reader.get_batch(uniform_indices(len(reader), count)).asnumpy())


def from_the_start(path: Path, count: int) -> int:
    with av.open(str(path)) as container:
        wanted = set(uniform_indices(container.streams.video[0].frames, count))
        frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i in wanted]
    return len(frames)


def timed(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, over rounds that run all of them in a new order."""
    for candidate in candidates.values():
        candidate()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in random.sample(list(candidates), len(candidates)):
            start = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    prepared = processor()
    encoder = Encoder(prepared)
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(16):
        coarse = PILImage.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
        pictures.append(folder / f"{i}.jpg")
        coarse.resize((640, 480)).save(pictures[-1], quality=90)

    def limit() -> None:
        for path in pictures:
            prepared.image_processor(PILImage.open(path).convert("RGB"), return_tensors="pt")

    images = timed(
        {
            "limit": limit,
            "mmdora": lambda: [encoder.encode(sample(path, i)) for i, path in enumerate(pictures)],
            "LLaVA's way": lambda: [llava_way(prepared, path, i) for i, path in enumerate(pictures)],
        },
        rounds,
    )
    text = timed(
        {
            "mmdora": lambda: [encoder.encode(sample(None, i)) for i in range(200)],
            "LLaVA's way": lambda: [llava_way(prepared, None, i) for i in range(200)],
        },
        rounds,
    )
    figures = {
        "images a second": {name: round(len(pictures) / seconds, 1) for name, seconds in images.items()},
        "conversations a second": {name: round(200 / seconds) for name, seconds in text.items()},
    }
    figures["images a second"]["mmdora / limit"] = round(images["limit"] / images["mmdora"], 3)
    for height, size in ((320, (426, 320)), (720, (1280, 720))):
        clip, config = write_clip(folder / f"{height}.mp4", 240, size), VideoConfig(num_frames=8)
        video = timed({"limit": lambda: raw_decord(clip, 8), "mmdora": lambda: load_video(clip, config)}, rounds)  # noqa: B023
        row = {name: round(8 / seconds, 1) for name, seconds in video.items()}
        figures[f"frames a second, {height} lines"] = row | {
            "mmdora / limit": round(video["limit"] / video["mmdora"], 3)
        }
    long = write_clip(folder / "long.mp4", 3000, (426, 320))
    for reader in ("decord", "pyav"):
        config = VideoConfig(num_frames=8, reader=reader)
        sparse = timed({"from the start": lambda: from_the_start(long, 8), reader: lambda: load_video(long, config)}, 3)  # noqa: B023
        row = {"times as fast as decoding all": round(sparse["from the start"] / sparse[reader], 1)}
        figures[f"8 of 3000 frames, {reader}"] = row
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), args.rounds)
    if args.out is not None:
        args.out.write_text(json.dumps(about_machine() | {"figures": figures}, indent=2) + "\n", encoding="utf-8")
    for what, row in figures.items():
        print(f"{what:32} " + "   ".join(f"{name} {value:g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
