"""How fast conversations become tensors, on one core, beside the ways that peers take; ratios within one run.

    python benchmarks/encode.py [--model assets/tiny-llava] [--samples 2000]

Text: `Encoder.encode` against the processor's own `apply_chat_template(..., tokenize=True)`, which makes no labels, and
against prefix differences, which is what a template without `{% generation %}` takes. Pictures: against decoding and
the processor alone, given the rendered text, which makes no labels either.
"""

from __future__ import annotations

import argparse
import copy
import io
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text
from mmdora.config import ModelConfig
from mmdora.loading import load_model

WORDS = "what is the color of a circle red blue left right how many are there in this picture"


def conversation(seed: int, *media: Image) -> Sample:
    """Two short questions with their answers, about 50 tokens."""
    rng = random.Random(seed)
    turns = []
    for words, role in ((12, "user"), (6, "assistant"), (8, "user"), (6, "assistant")):
        parts = (*(media if not turns else ()), Text(" ".join(rng.choices(WORDS.split(), k=words))))
        turns.append(Message(role, parts))
    return Sample(str(seed), tuple(turns), "benchmark")


def per_second(work: Callable[[Sample], object], samples: Iterable[Sample], rounds: int = 3) -> float:
    """Samples a second of processor time: the best of some rounds."""
    samples = list(samples)
    for sample in samples[:20]:
        work(sample)
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for sample in samples:
            work(sample)
        best = min(best, time.process_time() - start)
    return len(samples) / best


def write_picture(path: Path, seed: int) -> Image:
    """A JPEG of 640 × 480, as cameras' are after resizing for the web."""
    small = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    PILImage.fromarray(small).resize((640, 480), PILImage.Resampling.BICUBIC).save(path, quality=90)
    return Image(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="assets/tiny-llava")
    parser.add_argument("--samples", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _, processor = load_model(ModelConfig(path=arguments.model, dtype="float32"))
    encoder = Encoder(processor)
    unmarked = copy.copy(processor)
    unmarked.chat_template = re.sub(r"\{%-? (end)?generation -?%\}", "", processor.chat_template)

    def template_and_processor(sample: Sample) -> object:
        messages = [{"role": m.role, "content": [{"type": "text", "text": m.text}]} for m in sample.messages]
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")

    def decode_and_process(sample: Sample) -> object:
        (part,) = sample.media()
        with PILImage.open(io.BytesIO(part.path.read_bytes())) as image:
            return processor(text=[rendered[sample.id]], images=[[image.convert("RGB")]], return_tensors="pt")

    texts = [conversation(seed) for seed in range(arguments.samples)]
    ours = per_second(encoder.encode, texts)
    print(f"text: {ours:,.0f} conversations a second and core")
    print(f"  {ours / per_second(template_and_processor, texts):.2f} × the processor's own, without labels")
    print(f"  {ours / per_second(Encoder(unmarked).encode, texts):.2f} × with a template that has no markers")
    with tempfile.TemporaryDirectory() as folder:
        pictures = [conversation(i, write_picture(Path(folder) / f"{i}.jpg", i)) for i in range(60)]
        rendered = {sample.id: encoder.render(sample) for sample in pictures}
        ours = per_second(encoder.encode, pictures)
        print(f"pictures: {ours:,.1f} a second and core")
        print(f"  {ours / per_second(decode_and_process, pictures):.2f} × decoding and the processor alone")


if __name__ == "__main__":
    main()
