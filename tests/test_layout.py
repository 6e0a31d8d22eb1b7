"""Batches of families with unusual tensors: every sample computes and answers what it does alone."""

from __future__ import annotations

import importlib
from contextlib import suppress

import pytest
import torch

from data_pipelines.collator import Collator
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from eval.benchmarks import Question
from eval.generation import generate
from mmdora.core.config import VideoConfig
from mmdora.core.errors import RunError, UserError
from mmdora.models.batching import check_micro_batch_size, separate_samples
from tests.batch_families import BATCH_FAMILIES, build_sensitive
from tests.families import FAMILIES, Family
from tests.media import write_image, write_video
from tests.test_encoding import assistant, user

LONG = "Say of one thing after another what it is and where it stands."


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, list[list[Text | Image | Video]]]:
    """The parts of questions by kind, with images and videos of several shapes."""
    folder = tmp_path_factory.mktemp("media")
    sizes = [(48, 32), (32, 80), (120, 40)]
    small, tall, wide = (Image(write_image(folder / f"{i}.png", i, size)) for i, size in enumerate(sizes))
    first, second = (Video(write_video(folder / f"{i}.mp4", frames=6, size=(64, 48 + 16 * i))) for i in range(2))
    return {
        "image": [[small, Text("What?")], [tall, Text(LONG)]],
        "two images": [[tall, Text("and"), small, Text("Which of two?")], [small, wide, tall, Text(LONG)]],
        "video": [[first, Text("What is it?")], [second, Text(LONG)]],
        "text": [[Text("What?")], [Text(LONG)]],
    }


@pytest.fixture(scope="module", params=BATCH_FAMILIES)
def family(request, parts):
    """(model, encoder, samples) of one family; the samples' answers are to be trained on."""
    model, processor = build_sensitive(BATCH_FAMILIES[request.param])
    chosen = [own for kind in BATCH_FAMILIES[request.param].media for own in parts[kind]]
    samples = [Sample(str(i), (user(*own), assistant("one of two")), "test") for i, own in enumerate(chosen)]
    return model, Encoder(processor, VideoConfig(num_frames=3)), samples


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_sample_of_a_batch_gives_the_logits_that_it_gives_alone(family, side):
    """Before: Mllama up to 2.2 off, Molmo 2 4.0, Idefics 0.04, Ernie 0.01; MiniCPM and PerceptionLM raised errors."""
    model, encoder, samples = family
    rows = [encoder.encode(sample) for sample in samples]
    with torch.no_grad():
        alone = [model(**{k: v for k, v in row.items() if k != "labels"}).logits[0] for row in rows]
        separate_samples(model)
        batch = Collator(encoder.pad_token_id, side=side, layout=encoder.layout)(rows)
        together = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    for logits, want, labels, row in zip(together, alone, batch["labels"], rows, strict=True):
        place = slice(-len(want), None) if side == "left" else slice(len(want))
        torch.testing.assert_close(logits[place], want, atol=1e-4, rtol=1e-4)
        assert torch.equal(labels[place], row["labels"][0])
        assert int((labels != IGNORED).sum()) == int((row["labels"] != IGNORED).sum())


def test_batches_give_the_answers_of_single_questions(family, monkeypatch):
    model, encoder, samples = family
    questions = [Question(s.id, Sample(s.id, s.messages[:1], "test"), (), s.id) for s in samples]
    monkeypatch.setattr(encoder.processor.tokenizer, "decode", lambda row, **_: " ".join(map(str, row)))
    single = {q.id: tokens for q, tokens in generate(model, encoder, questions, 1, 5)}
    assert len(set(single.values())) >= 3
    for size in (3, len(questions)):
        assert {q.id: tokens for q, tokens in generate(model, encoder, questions, size, 5)} == single


def test_a_cut_sample_keeps_one_entry_per_token_in_every_tensor(family):
    _, encoder, samples = family
    whole = encoder.encode(samples[0])
    limit = whole["input_ids"].shape[1] - 3
    cut = Encoder(encoder.processor, encoder.video, limit, "truncate").encode(samples[0])
    for key in encoder.layout.per_token & cut.keys():
        assert torch.equal(cut[key], whole[key][:, :limit]), key


def test_what_is_found_out_about_each_tensor():
    def layout(name: str):
        family = (BATCH_FAMILIES | FAMILIES)[name]
        return Encoder(family.build()[1]).layout

    mllama = layout("mllama")
    assert "cross_attention_mask" in mllama.per_token
    assert mllama.per_sample == {"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"}
    assert layout("minicpm").dimensions["pixel_values"] == 3
    assert layout("molmo2").references["image_token_pooling"] == ("pixel_values", 2)
    assert layout("perception_lm").unpadded == {"pixel_values"}
    llava = layout("llava_next")
    assert (llava.dimensions, llava.per_sample) == ({"pixel_values": 0, "image_sizes": 0}, set())
    assert not layout("idefics3").per_sample  # texts beside images need no pixels
    assert "moe_mm_token_type_ids" in layout("ernie").per_token


def test_a_tokenizer_without_padding_is_left_as_it_is():
    _, processor = BATCH_FAMILIES["minicpm"].build()
    processor.tokenizer.pad_token = None
    assert Encoder(processor).layout.dimensions["pixel_values"] == 3
    assert processor.tokenizer.pad_token is None


def test_a_sample_without_images_learns_the_same_beside_one_with_images(parts):
    """The gradients of Mllama's language model for a text do not depend on the rest of the batch."""
    model, processor = build_sensitive(BATCH_FAMILIES["mllama"])
    separate_samples(model)
    encoder = Encoder(processor)
    text, image = (encoder.encode(Sample("s", (user(*parts[k][0]), assistant("one")), "t")) for k in ("text", "image"))
    image["labels"] = torch.full_like(image["labels"], IGNORED)
    gradients = []
    for rows in ([text], [text, image]):
        model.zero_grad()
        model(**Collator(encoder.pad_token_id, layout=encoder.layout)(rows)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_families_that_transformers_does_not_batch_exactly_are_not_batched(monkeypatch, caplog):
    model, processor = FAMILIES["llava"].build()
    questions = [Question(str(i), Sample(str(i), (Message("user", (Text("a " * i),)),), "t"), (), "") for i in (1, 5)]
    sizes, plain = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **kw: sizes.append(len(input_ids)) or plain(input_ids, **kw)
    )
    for family, expected in (("llava", [2]), ("emu3", [1, 1]), ("git", [1, 1])):
        sizes.clear()
        monkeypatch.setattr(type(model.config), "model_type", family)
        list(generate(model, Encoder(processor), questions, 2, 1))
        assert sizes == expected
        assert (f"{family} computes other answers in a batch" in caplog.text) == (expected != [2])
    check_micro_batch_size(model.config, 2)  # GIT's positions are right if padding is on the right
    monkeypatch.setattr(type(model.config), "model_type", "emu3")
    check_micro_batch_size(model.config, 1)
    with pytest.raises(UserError, match=r"training\.micro_batch_size: emu3 computes other features"):
        check_micro_batch_size(model.config, 2)


UNTRIED = {
    "diffusion_gemma": "answers at random",
    "shieldgemma2": "classifies: its processor makes three texts of one",
    "deepseek_ocr2": "slow",
    "unlimited_ocr": "slow",
}


@pytest.mark.slow
def test_batches_of_all_families_give_the_answers_of_single_questions(shared, parts, monkeypatch):
    """Every family of transformers that a tiny builder exists for, with the questions that it accepts."""
    monkeypatch.syspath_prepend(shared / "families")
    builders = importlib.import_module("table").F
    different, tried = {}, []
    for name, (build, media) in builders.items():
        if name in UNTRIED:
            continue
        try:
            model, processor = build_sensitive(Family(build, media))
        except (ImportError, TypeError):  # a package is missing, or no question can be asked
            continue
        monkeypatch.setattr(processor.tokenizer, "decode", lambda row, **_: " ".join(map(str, row)))
        encoder, single = Encoder(processor, VideoConfig(num_frames=3)), {}
        asked = [(f"{kind} {i}", own) for kind in media for i, own in enumerate(parts[kind])]
        questions = [Question(name, Sample(name, (user(*own),), "test"), (), name) for name, own in asked]
        for question in questions:
            with suppress(RunError, TypeError, AttributeError):
                single |= {q.id: answer for q, answer in generate(model, encoder, [question], 1, 4)}
        batch = generate(model, encoder, [q for q in questions if q.id in single], 3, 4)
        if {q.id: answer for q, answer in batch} != single:
            different[name] = single
        tried += [name] * (len(single) > 1)
    assert not different
    assert len(tried) > 60
