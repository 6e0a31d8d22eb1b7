"""Composed models whose projector is a resampler: an image or a frame takes `num_queries` tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationMixin

import mmdora
from data_pipelines.collator import Collator
from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from mmdora.apps.merge import MergeResult, merge_target
from mmdora.core.config import ModelConfig, VideoConfig
from mmdora.core.errors import UserError
from mmdora.models.loading import load_model, save_model
from mmdora.models.resampler import Resampler, grid_positions
from tests.media import write_image, write_video
from tests.test_composed import TOWERS, compose, logits
from tests.tiny_models import write_language_model

QUERIES = 5
FRAMES = 2
ALL = {part: {"method": "dora", "rank": 2} for part in ("vision", "projector", "language")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("resampler")
    write_language_model(path / "llama", "llama")
    write_image(path / "wide.png", 0, (64, 24))
    write_image(path / "other.png", 1)
    write_video(path / "clip.mp4")
    return path


def make(folder: Path, tower: str = "clip", language: str = "llama", **settings):
    if not (folder / language).exists():
        write_language_model(folder / language, language)
    return compose(folder, tower, language, **{"projector": "resampler", "num_queries": QUERIES, **settings})


def samples(folder: Path, processor) -> dict[str, dict[str, torch.Tensor]]:
    wide, other, video = Image(folder / "wide.png"), Image(folder / "other.png"), Video(folder / "clip.mp4")
    media = {"image": (wide,), "two images": (wide, other), "video": (video,), "both": (video, other), "text": ()}
    answer = Message("assistant", (Text("a dog"),))
    encoder = Encoder(processor, VideoConfig(num_frames=FRAMES))
    questions = {kind: Message("user", (*parts, Text("what is it?"))) for kind, parts in media.items()}
    return {kind: encoder.encode(Sample(kind, (question, answer), "t")) for kind, question in questions.items()}


@pytest.fixture(scope="module")
def composed(folder):
    """(model, processor, samples) that tests share and do not change."""
    model, processor = make(folder)
    return model, processor, samples(folder, processor)


def prompt(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in row.items() if key != "labels"}


def test_an_image_or_a_frame_takes_num_queries_tokens(composed):
    model, _, rows = composed
    image, video = model.config.image_token_id, model.config.video_token_id
    counts = {k: [int((row["input_ids"] == t).sum()) for t in (image, video)] for k, row in rows.items()}
    video_tokens = FRAMES * QUERIES
    assert counts == {
        "image": [QUERIES, 0],
        "two images": [2 * QUERIES, 0],
        "video": [0, video_tokens],
        "both": [QUERIES, video_tokens],
        "text": [0, 0],
    }
    assert rows["two images"]["pixel_values"].shape == (2, 3, 32, 32)  # one square per image
    assert rows["video"]["pixel_values_videos"].shape == (1, FRAMES, 3, 32, 32)


def test_the_default_is_64_queries(folder):
    model, processor = make(folder, num_queries=None)
    assert len(model.model.multi_modal_projector.queries) == processor.num_image_tokens == 64


@pytest.mark.parametrize("tower", TOWERS)
def test_every_adapter_is_trained_by_every_kind_of_sample(tower, folder):
    model, processor = make(folder, tower)
    rows = samples(folder, processor)
    mmdora.inject_adapters(model, ALL)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_projector = {n.split(".lora_")[0].rpartition(".")[2] for n in trained if "projector" in n}
    assert of_projector == {"q_proj", "k_proj", "v_proj", "out_proj", "linear_1", "linear_2"}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(2):
        for kind, row in rows.items():
            optimizer.zero_grad()
            loss = model(**row).loss
            loss.backward()
            assert loss.isfinite()
            # Text does not use the vision encoder. B is zero at first, so A has no gradient in the first step.
            expected = [n for n in trained if kind != "text" or "language_model" in n]
            without = [n for n in expected if trained[n].grad is None or not trained[n].grad.any()]
            assert [n for n in without if step or ".lora_A" not in n] == []
            optimizer.step()


def answer(model, inputs: dict[str, torch.Tensor], **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate four tokens per row; returns them and their logits [4, rows, vocabulary]."""
    length = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    result = model.generate(**inputs, **length, **options, output_logits=True, return_dict_in_generate=True)
    return result.sequences[:, -4:], torch.stack(result.logits)


@pytest.mark.parametrize("language", ["llama", "qwen2", "opt"])
def test_batching_and_the_cache_change_no_logits(language, folder):
    model, processor = make(folder, language=language)
    torch.nn.init.normal_(model.lm_head.weight)  # otherwise all answers are equal
    rows = samples(folder, processor)
    pad = processor.tokenizer.pad_token_id
    together = logits(model, [Collator(pad)(list(rows.values()))])[0]
    for index, alone in enumerate(logits(model, list(rows.values()))):
        torch.testing.assert_close(together[index, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)
    batch = Collator(pad, "left")([prompt(row) for row in rows.values()])
    answers, chosen = answer(model, batch)
    assert not torch.allclose(chosen[0, 0], chosen[0, 1], atol=1e-2)  # one image or two
    uncached, chosen_again = answer(model, batch, use_cache=False)
    assert torch.equal(uncached, answers)
    torch.testing.assert_close(chosen_again, chosen, atol=1e-4, rtol=1e-4)
    for index, row in enumerate(rows.values()):
        alone, chosen_alone = answer(model, prompt(row))
        assert torch.equal(alone[0], answers[index])
        torch.testing.assert_close(chosen_alone[:, 0], chosen[:, index], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(
    not hasattr(GenerationMixin, "_expand_multimodal_outputs"),
    reason="before transformers 5.23 beams of any LLaVA mix up their images",
)
def test_beam_search_with_two_images(folder):
    """Each beam must have both images, in order."""
    model, processor = make(folder)
    torch.nn.init.normal_(model.lm_head.weight)
    row = prompt(samples(folder, processor)["two images"])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3}
    result = model.generate(**row, **options, output_scores=True, return_dict_in_generate=True)
    ids = result.sequences
    (scores,) = logits(model, [row | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    score = scores[:, -5:-1].log_softmax(-1).gather(2, ids[:, -4:, None]).mean()
    torch.testing.assert_close(result.sequences_scores[0], score, atol=1e-4, rtol=1e-4)


def test_the_features_of_a_video_are_those_of_its_frames(composed):
    model, _, rows = composed
    frames = rows["video"]["pixel_values_videos"]
    with torch.no_grad():
        (video,) = model.get_video_features(frames).pooler_output
        images = model.get_image_features(frames[0]).pooler_output
    torch.testing.assert_close(video, torch.cat(list(images)))
    assert not torch.allclose(images[0], images[1])


def test_the_resampler_depends_on_the_positions_of_patches():
    torch.manual_seed(0)
    resampler = Resampler(QUERIES, 32, 16)
    resampler.init_weights(0.5)
    patches = torch.randn(1, 16, 32)
    order = torch.randperm(16)
    assert not torch.allclose(resampler(patches[:, order]), resampler(patches), atol=1e-2)
    # The formula, written out for one head:
    q, k, v = (layer.weight for layer in (resampler.q_proj, resampler.k_proj, resampler.v_proj))
    normed, queries = resampler.norm_patches(patches)[0], resampler.norm_queries(resampler.queries)
    keys = (normed + grid_positions(4, 32)) @ k.T
    read = (queries @ q.T @ keys.T / math.sqrt(32)).softmax(-1) @ (normed @ v.T)
    tokens = resampler.norm_read(resampler.queries + resampler.out_proj(read))
    expected = resampler.linear_2(F.gelu(resampler.linear_1(tokens)))
    torch.testing.assert_close(resampler(patches)[0], expected, atol=1e-4, rtol=1e-4)


def test_positions_encode_rows_and_columns():
    table = grid_positions(3, 10).view(3, 3, 10)
    assert torch.equal(table[1, :, :4], table[1, :1, :4].expand(3, 4))  # the row
    assert torch.equal(table[:, 2, 4:8], table[:1, 2, 4:8].expand(3, 4))  # the column
    assert len(grid_positions(20, 8).unique(dim=0)) == 400
    assert not table[..., 8:].any()


def test_the_same_config_gives_the_same_weights_and_an_adapter_fits(folder, tmp_path):
    first, processor = make(folder)
    projector = first.model.multi_modal_projector
    std = first.config.text_config.initializer_range
    for weight in (projector.queries, projector.k_proj.weight, projector.linear_2.weight):
        assert 0.5 * std < weight.std() < 2 * std
    torch.manual_seed(123)  # as in another run
    second, _ = make(folder)
    assert all(torch.equal(second.state_dict()[name], value) for name, value in first.state_dict().items())
    mmdora.inject_adapters(first, {"language": ALL["language"], "projector": {"method": "full"}})
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name or "queries" in name:
                parameter.normal_()
    mmdora.save_adapter(first, tmp_path)
    mmdora.load_adapter(second, tmp_path)
    rows = list(samples(folder, processor).values())
    assert all(torch.equal(a, b) for a, b in zip(logits(second, rows), logits(first, rows), strict=True))


def test_gradient_checkpointing_changes_no_gradient(folder):
    model, processor = make(folder)
    row = samples(folder, processor)["both"]
    mmdora.inject_adapters(model, {"vision": {"method": "full"}, "projector": {"method": "full"}})

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(**row).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    sizes = [g.abs().max().item() for name, g in plain.items() if "projector" in name]
    assert len(sizes) == len(list(model.model.multi_modal_projector.parameters()))
    assert min(sizes) > 1e-7 * max(sizes)  # above rounding error: every parameter has an effect
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4)


def test_fillers_change_neither_loss_nor_gradients(folder):
    model, processor = make(folder)
    encoder = Encoder(processor, VideoConfig(num_frames=FRAMES))
    fillers = {"pixel_values": encoder.filler(Image), "pixel_values_videos": encoder.filler(Video)}
    row = samples(folder, processor)["text"]
    filled = Collator(processor.tokenizer.pad_token_id, fillers=fillers)([row])
    mmdora.inject_adapters(model, ALL)
    loss = model(**filled).loss
    torch.testing.assert_close(loss, model(**row).loss)
    loss.backward()
    projector = [p for n, p in model.named_parameters() if p.requires_grad and "projector" in n]
    assert all(p.grad is not None and not p.grad.any() for p in projector)  # every rank runs it, without a gradient


def test_a_saved_model_is_adapted_merged_and_saved_again(folder, tmp_path, capsys):
    """An adapter directory on a saved composed model with an OpenCLIP tower, through `mmdora merge`."""
    model, processor = make(folder, "open_clip_vit", "qwen2")
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "merged"))
    save_model(model, processor, base)
    reloaded, processor_again = load_model(ModelConfig(path=str(base), dtype="float32"))
    rows, encoded_again = samples(folder, processor), samples(folder, processor_again)
    assert all(torch.equal(encoded_again[kind][key], row[key]) for kind, row in rows.items() for key in row)
    before, after = logits(model, list(rows.values())), logits(reloaded, list(rows.values()))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))

    mmdora.inject_adapters(reloaded, ALL)
    with torch.no_grad():
        for name, parameter in reloaded.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    mmdora.save_adapter(reloaded, adapter)
    result = merge_target(str(adapter), out)
    assert isinstance(result, MergeResult)
    assert (result.out, result.dtype, result.needs_mmdora) == (out, torch.bfloat16, True)
    low, high = result.logit_range
    assert 0 < result.max_difference < 0.05 * (high - low)
    assert capsys.readouterr().out == ""  # only the command prints
    card = (out / "README.md").read_text()
    assert "import mmdora.models\n" in card
    assert "- language model: `qwen2`" in card
    merged = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert type(merged.model.vision_tower).__name__ == "CLIPVisionModel"
    assert AutoProcessor.from_pretrained(out).num_image_tokens == QUERIES
    with pytest.raises(UserError, match="is not empty; give a new directory"):
        merge_target(str(adapter), out)


def test_placeholders_and_settings_that_do_not_fit_are_errors(composed):
    model, _, rows = composed
    row = rows["image"]
    ids = row["input_ids"]
    without = {"input_ids": ids.where(ids != model.config.image_token_id, 2)}
    with pytest.raises(ValueError, match=f"hold 0 placeholders .* for {QUERIES} media tokens"):
        model(**row | without)
    parts = {"vision_encoder": {"type": "clip", "name": "x"}, "language_model": {"path": "x"}}
    for settings, message in (
        ({**parts, "num_queries": 8}, "'num_queries' belongs to 'projector: resampler', not to 'mlp2x_gelu'"),
        ({"path": "x", "num_queries": 8}, "'num_queries' belongs to 'projector: resampler'"),
        ({"path": "x", "projector": "resampler"}, "needs a composed model"),
        ({**parts, "projector": "resampler", "num_queries": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.model_validate(settings)
