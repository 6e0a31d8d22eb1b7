"""Samples packed into rows train as they do apart: equal losses and gradients, and none of them lost."""

from __future__ import annotations

import pytest
import torch

from data_pipelines.collator import Collator
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from mmdora.config import VideoConfig
from mmdora.training.packing import EXACT, check_packing, packed_inputs
from tests.families import FAMILIES
from tests.media import write_image, write_video
from tests.test_families import build, sample, samples  # noqa: F401

Rows = list[dict[str, torch.Tensor]]


def loss_of_each(model, rows: Rows) -> torch.Tensor:
    """The mean over all tokens, each sample by itself."""
    counts = [int((row["labels"][:, 1:] != IGNORED).sum()) for row in rows]
    losses = [model(**row).loss * count for row, count in zip(rows, counts, strict=True)]
    return sum(losses) / sum(counts)


def check_equal(model, rows: Rows, limit: int, pad: int) -> None:
    packed = Collator(pad, pack=limit)(rows)
    assert packed["input_ids"].shape[0] < len(rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for loss in (loss_of_each(model, rows), model(**packed_inputs(model, packed)).loss):
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        results.append((loss, [g for g in gradients if g is not None]))
    (apart, theirs), (together, ours) = results
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tiny_base_with_pictures_videos_and_text(tiny, tmp_path, attention):
    model, processor = tiny
    model.set_attn_implementation(attention)
    encoder = Encoder(processor, VideoConfig(num_frames=2))
    wide = Image(write_image(tmp_path / "wide.png", size=(200, 50)))
    square = Image(write_image(tmp_path / "square.png", seed=1))
    clip = Video(write_video(tmp_path / "clip.mp4", frames=4))
    answer = Message("assistant", (Text("red and blue"),))
    parts = [(wide, "What?"), ("Text alone?",), (clip, "Which way does it go?"), (square, "And this?"), ("No?",)]
    questions = [tuple(Text(p) if isinstance(p, str) else p for p in part) for part in parts]
    rows = [encoder.encode(Sample("s", (Message("user", q), answer), "t")) for q in questions]
    longest = max(row["input_ids"].shape[1] for row in rows)
    check_equal(model, rows, longest + 40, processor.tokenizer.pad_token_id)
    check_equal(model, rows, 10 * longest, processor.tokenizer.pad_token_id)
    check_packing(model)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in EXACT])
def test_every_family_that_is_not_refused(name, samples):  # noqa: F811
    model, processor = build(name)
    check_packing(model)
    encoder = Encoder(processor, VideoConfig(num_frames=4))
    kinds = FAMILIES[name].media
    rows = [encoder.encode(samples[kind]) for kind in (*kinds, kinds[-1], kinds[0])]
    longest = max(row["input_ids"].shape[1] for row in rows)
    check_equal(model, rows, 2 * longest, processor.tokenizer.pad_token_id)
