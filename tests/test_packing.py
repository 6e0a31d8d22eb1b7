"""Samples packed into rows train like single samples: equal losses and gradients, and none is lost."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from torch import nn

from data_pipelines.collator import Collator
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from mmdora.core.config import DataConfig, SourceConfig, VideoConfig
from mmdora.core.errors import UserError
from mmdora.training.packing import (
    BIDIRECTIONAL,
    SUPPORTED_FAMILIES,
    check_packing,
    packed_inputs,
    row_length,
)
from tests.families import CROPPED, FAMILIES, LLAVA_PROCESSOR, _llava_settings, _llava_words
from tests.media import write_image, write_video
from tests.test_families import build, samples  # noqa: F401
from tests.test_runs import command, small
from tests.tiny_parts import text

Rows = list[dict[str, torch.Tensor]]


def loss_of_single_samples(model, rows: Rows) -> torch.Tensor:
    """Return the mean loss over all tokens, with one forward pass per sample."""
    counts = [int((row["labels"][:, 1:] != IGNORED).sum()) for row in rows]
    losses = [model(**row).loss * count for row, count in zip(rows, counts, strict=True)]
    return sum(losses) / sum(counts)


def check_equal(model, rows: Rows, limit: int, pad: int) -> None:
    packed = Collator(pad, pack=limit)(rows)
    assert packed["input_ids"].shape[0] < len(rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for loss in (loss_of_single_samples(model, rows), model(**packed_inputs(model, packed)).loss):
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        results.append((loss, [g for g in gradients if g is not None]))
    (single_loss, single_gradients), (packed_loss, packed_gradients) = results
    torch.testing.assert_close(packed_loss, single_loss, atol=1e-5, rtol=1e-5)
    assert len(packed_gradients) == len(single_gradients) > 0
    for gradient, expected in zip(packed_gradients, single_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tiny_base_with_images_videos_and_text(tiny, tmp_path, attention):
    model, processor = tiny
    model.set_attn_implementation(attention)
    encoder = Encoder(processor, VideoConfig(num_frames=2))
    wide = Image(write_image(tmp_path / "wide.png", size=(200, 50)))
    square = Image(write_image(tmp_path / "square.png", seed=1))
    video = Video(write_video(tmp_path / "video.mp4", frames=4))
    answer = Message("assistant", (Text("red and blue"),))
    parts = [(wide, "What?"), ("Text alone?",), (video, "Which way does it go?"), (square, "And this?"), ("No?",)]
    questions = [tuple(Text(p) if isinstance(p, str) else p for p in part) for part in parts]
    rows = [encoder.encode(Sample("s", (Message("user", q), answer), "t")) for q in questions]
    longest = max(row["input_ids"].shape[1] for row in rows)
    check_equal(model, rows, longest + 40, processor.tokenizer.pad_token_id)
    check_equal(model, rows, 10 * longest, processor.tokenizer.pad_token_id)
    check_packing(model.config)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in SUPPORTED_FAMILIES])
def test_every_supported_family(name, samples):  # noqa: F811
    model, processor = build(name)
    check_packing(model.config)
    encoder = Encoder(processor, VideoConfig(num_frames=4))
    kinds = FAMILIES[name].media
    rows = [encoder.encode(samples[kind]) for kind in (*kinds, kinds[-1], kinds[0])]
    longest = max(row["input_ids"].shape[1] for row in rows)
    check_equal(model, rows, 2 * longest, processor.tokenizer.pad_token_id)


LANGUAGE = {
    "mistral": {"sliding_window": 16},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_supported_language_models_with_sliding_windows(name, samples):  # noqa: F811
    torch.manual_seed(0)
    words = _llava_words()
    settings = _llava_settings(words, text_config=text(words, name, **LANGUAGE[name]))
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**settings)).eval()
    nn.init.normal_(model.get_output_embeddings().weight)
    encoder = Encoder(hf.LlavaProcessor(hf.CLIPImageProcessor(**CROPPED), words, **LLAVA_PROCESSOR))
    check_packing(model.config)
    rows = [encoder.encode(samples[kind]) for kind in ("image", "text", "two images", "text")]
    check_equal(model, rows, 400, words.pad_token_id)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_packing_a_bidirectional_family_is_an_error(name):
    model, _ = build(name)
    with pytest.raises(UserError, match=rf"data\.packing: {name} attends in both directions.*data\.packing=false"):
        check_packing(model.config)


def test_packing_an_unsupported_family_is_an_error(tiny, monkeypatch):
    model, _ = tiny
    monkeypatch.setattr(model.config.get_text_config(), "model_type", "opt")
    with pytest.raises(UserError, match=r"data\.packing: opt has not been tested"):
        check_packing(model.config)
    monkeypatch.setattr(model.config, "model_type", "unheard_of")
    with pytest.raises(UserError, match=r"data\.packing: unheard_of has not been tested"):
        check_packing(model.config)


def test_a_sample_does_not_attend_to_its_neighbour(tiny):
    """With `use_cache` the mask is not split and it would: this shows that the test can fail."""
    model, processor = tiny
    encoder = Encoder(processor)
    rows = [
        encoder.encode(Sample("s", (Message("user", (Text(q),)), Message("assistant", (Text("yes"),))), "t"))
        for q in ("What is it now?", "Is it red?")
    ]
    batch = Collator(processor.tokenizer.pad_token_id, pack=400)(rows)
    assert "attention_mask" not in batch
    second = slice(rows[0]["input_ids"].shape[1], None)
    logits = []
    for change in (0, 1):
        changed = batch | {"input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, 5] += change
        with torch.no_grad():
            inputs = packed_inputs(model, changed)
            logits.append([model(**x).logits[0, second] for x in (inputs, inputs | {"use_cache": True})])
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.equal(logits[0][1], logits[1][1])


def test_rows_are_padded_and_media_follow_the_order_of_their_samples(tiny, tmp_path):
    encoder = Encoder(tiny[1])
    images = [Image(write_image(tmp_path / f"{seed}.png", seed, size=(16, 16))) for seed in range(3)]
    questions = ("One?", "Two? " * 20, "Three, is it?")
    answer = Message("assistant", (Text("yes"),))
    pairs = zip(images, questions, strict=True)
    rows = [encoder.encode(Sample("s", (Message("user", (image, Text(q))), answer), "t")) for image, q in pairs]
    lengths = [row["input_ids"].shape[1] for row in rows]
    batch = Collator(7, pack=max(lengths))(rows)
    assert batch["input_ids"].shape == (2, max(lengths))  # the longest one; then the others, ordered by length
    assert torch.equal(batch["pixel_values"], torch.cat([rows[place]["pixel_values"] for place in (1, 2, 0)]))
    used = lengths[0] + lengths[2]
    assert batch["position_ids"][1].tolist() == [
        *range(lengths[2]),
        *range(lengths[0]),
        *range(max(lengths) - used),  # padding is a sequence of its own
    ]
    assert (batch["input_ids"][1, used:] == 7).all()
    assert (batch["labels"][1, used:] == IGNORED).all()


def test_the_first_token_of_a_sample_is_never_a_label(tiny):
    """In a packed row it would be predicted from the sample before it."""
    processor = tiny[1]
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
    )
    row = Encoder(processor).encode(Sample("s", (Message("assistant", (Text("yes it is"),)),), "t"))
    supervised = row["labels"][0] != IGNORED
    assert row["input_ids"][0, 0] != processor.tokenizer.bos_token_id
    assert supervised.tolist() == [False] + [True] * (len(supervised) - 1)


def test_flash_attention_gets_a_single_row(tiny):
    model, _ = tiny
    data = DataConfig(train=[SourceConfig(path="x")], max_length=100, packing=True)
    assert row_length(model, data) == 100
    assert row_length(model, data.model_copy(update={"packing": False})) is None
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    assert row_length(model, data) > 10**9


def test_a_packed_run_has_the_losses_of_an_unpacked_one(world, tmp_path):
    losses = []
    for name, packing in (("padded", "false"), ("packed", "true")):
        overrides = ["evaluation=[]", "training.save_every=null", "data.max_length=900", f"data.packing={packing}"]
        assert command("train", *small(world, tmp_path / name, steps=2), *overrides) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-4, rtol=1e-4)
