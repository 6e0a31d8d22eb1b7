"""Every family in ARCHITECTURES: encoded, adapted, trained, saved, loaded and merged."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from data_pipelines.collator import Collator
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, SampleError, Text, Video
from mmdora import inject_adapters, load_adapter, merge_adapters, save_adapter
from mmdora.adapters import adapter_layers
from mmdora.core.config import VideoConfig
from mmdora.core.errors import UserError
from mmdora.models.architectures import ARCHITECTURES, architecture_of, find_part
from tests.families import FAMILIES, Built
from tests.media import write_image, write_video

DORA = {"method": "dora", "rank": 2}
NESTED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]  # the projector is inside the vision encoder


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, Sample]:
    folder = tmp_path_factory.mktemp("media")
    first, second = (Image(write_image(folder / f"{seed}.png", seed)) for seed in range(2))
    video = Video(write_video(folder / "clip.mp4", frames=4))
    return {
        "image": sample(first, "What is it?"),
        "two images": sample(first, "and", second, "What is one of two?"),
        "video": sample(video, "What is it after 0.5 seconds?"),
        "text": sample("What is it?"),
    }


def sample(*parts: Text | Image | Video | str) -> Sample:
    question = Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))
    answer = Message("assistant", (Text("one of two"),))
    again = Message("user", (Text("What?"),))
    return Sample("s", (question, answer, again, answer), "test")


def build(name: str) -> Built:
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs num2words")
    torch.manual_seed(0)
    model, processor = FAMILIES[name].build()
    nn.init.normal_(model.get_output_embeddings().weight)  # otherwise some gradients vanish
    return model.eval(), processor


def test_every_entry_is_tested():
    assert set(ARCHITECTURES) - set(FAMILIES) == {"vipllava"}  # llava with another projector


def train_two_steps(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest absolute gradient per parameter in the second step: in the first, B is zero and A has none."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in trained.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_encoded_trained_saved_loaded_and_merged(name, samples, tmp_path):
    model, processor = build(name)
    encoder = Encoder(processor, VideoConfig(num_frames=4))
    rows = {kind: encoder.encode(samples[kind]) for kind in FAMILIES[name].media}
    for row in rows.values():
        labels = row["labels"][0]
        supervised = processor.tokenizer.decode(labels[labels != IGNORED])
        # SmolVLM's processor has its own template for videos, with another end token and a space before the answer.
        supervised = supervised.replace("<end_of_utterance>", "<|im_end|>").replace(" one", "one")
        assert supervised == "one of two<|im_end|>" * 2
    batch = Collator(processor.tokenizer.pad_token_id)(list(rows.values()))
    with torch.no_grad():
        together = model(**batch).logits
        for index, row in enumerate(rows.values()):
            alone = model(**row).logits[0]
            torch.testing.assert_close(together[index, : len(alone)], alone, atol=1e-4, rtol=1e-4)

    # Gemma 3's projector is a bare parameter, which no adapter supports.
    projector = {"method": "full"} if name == "gemma3" else DORA
    report = inject_adapters(model, {"vision": DORA, "projector": projector, "language": DORA})
    assert all(part.trainable for part in report.parts)
    assert not [path for path, _ in adapter_layers(model) if path.endswith("lm_head")]
    gradients = train_two_steps(model, batch)
    assert gradients
    assert not [parameter for parameter, size in gradients.items() if size == 0.0]
    check_copies(name, model, batch, tmp_path / "adapter")


def check_copies(name: str, model: nn.Module, batch: dict[str, torch.Tensor], folder) -> None:
    """Check that the trained model, its saved adapter on a new base, and the merged model compute the same."""
    with torch.no_grad():
        trained = model(**batch).logits
        save_adapter(model, folder)
        fresh, _ = build(name)
        assert not torch.allclose(fresh(**batch).logits, trained, atol=1e-3)
        load_adapter(fresh, folder)
        assert torch.equal(fresh(**batch).logits, trained)
        merged = merge_adapters(model)
        assert not list(adapter_layers(merged))
        torch.testing.assert_close(merged(**batch).logits, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_batching_and_fillers_change_no_output(name, samples):
    model, processor = build(name)
    encoder = Encoder(processor, VideoConfig(num_frames=3))  # odd: Qwen groups frames in pairs
    prompts = [encoder.encode_prompt(samples[kind]) for kind in FAMILIES[name].media]
    batch = Collator(processor.tokenizer.pad_token_id, side="left")(prompts)
    settings = {"max_new_tokens": 3, "do_sample": False}
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for index, prompt in enumerate(prompts):
        alone = model.generate(**prompt, **settings)[0, prompt["input_ids"].shape[1] :]
        assert together[index, : len(alone)].tolist() == alone.tolist()

    kinds = [Image, Video] if "video" in FAMILIES[name].media else [Image]
    fillers = [encoder.filler(kind) for kind in kinds]
    pixels = {next(key for key in filler if key.startswith("pixel_values")): filler for filler in fillers}
    row = encoder.encode(samples[FAMILIES[name].media[-1]])
    filled = Collator(processor.tokenizer.pad_token_id, fillers=pixels)([row])
    assert set(pixels) <= set(filled)
    torch.testing.assert_close(model(**filled).loss, model(**row).loss)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "video" in family.media])
def test_an_image_and_a_video_in_one_sample(name, samples):
    model, processor = build(name)
    image, video = (next(samples[kind].media()) for kind in ("image", "video"))
    both = sample(image, "and", video, "What is it?")
    encoder = Encoder(processor, VideoConfig(num_frames=2))
    if name == "smolvlm":
        with pytest.raises(SampleError, match="only one kind"):
            encoder.encode(both)
        return
    labels = encoder.encode(both)["labels"][0]
    assert processor.tokenizer.decode(labels[labels != IGNORED]) == "one of two<|im_end|>" * 2
    assert model(**encoder.encode(both)).loss.isfinite()


def test_an_answer_is_attended_causally(samples):
    """PaliGemma's prompt attends in both directions, its answer must not."""
    model, processor = build("paligemma")
    row = Encoder(processor).encode(samples["image"])
    changed = {key: value.clone() for key, value in row.items()}
    changed["input_ids"][0, -3] += 1
    with torch.no_grad():
        before, after = (model(**inputs).logits[0, :-3] for inputs in (row, changed))
    torch.testing.assert_close(before, after)
    prompt = Encoder(processor).encode_prompt(samples["image"])
    assert "labels" not in prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_of_every_family_ends_an_answer(name):
    """Also for a processor that needs an image in every sample."""
    _, processor = build(name)
    encoder = Encoder(processor)
    encoder.check_stop({processor.tokenizer.eos_token_id})
    with pytest.raises(UserError, match="without a token that stops generation"):
        encoder.check_stop({processor.tokenizer.convert_tokens_to_ids(processor.image_token)})


@pytest.mark.parametrize("name", NESTED)
def test_a_projector_inside_the_vision_encoder_is_not_part_of_vision(name):
    model, _ = build(name)
    vision, projector = (find_part(model, part) for part in ("vision", "projector"))
    report = inject_adapters(model, {"vision": DORA})
    assert report.parts[0].modules
    assert not [path for path in report.parts[0].modules + report.parts[0].skipped if "merger" in path]
    mergers = [p for n, p in model.named_parameters() if "merger" in n]
    assert [id(p) for _, p in projector.named_parameters(model)] == [id(p) for p in mergers]
    assert not {id(p) for _, p in vision.named_parameters(model)} & {id(p) for p in mergers}


@pytest.mark.parametrize("name", NESTED)
def test_full_vision_with_an_adapted_projector_inside(name, samples, tmp_path):
    model, processor = build(name)
    report = inject_adapters(model, {"vision": {"method": "full"}, "projector": DORA})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "merger" in n} == {n for n in trained if "lora_" in n}
    assert "model.visual.patch_embed" in report.parts[0].modules
    assert not [path for path in report.parts[0].modules if "merger" in path]
    batch = Encoder(processor).encode(samples["image"])
    train_two_steps(model, batch)
    check_copies(name, model, batch, tmp_path / "adapter")


def test_adapted_vision_with_a_full_projector_inside_and_a_conflict():
    model, _ = build("qwen3_vl")
    inject_adapters(model, {"vision": DORA, "projector": {"method": "full"}})
    assert all(p.requires_grad for n, p in model.named_parameters() if "merger" in n)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "blocks" in n and "lora_" not in n)
    model, _ = build("qwen3_vl")
    with pytest.raises(UserError, match=r"parts\.model\.visual trains model\.visual\.merger"):
        inject_adapters(model, {"model.visual": {"method": "full"}, "projector": DORA})


def test_targets_of_a_part_of_several_modules():
    model, _ = build("qwen3_vl")
    report = inject_adapters(model, {"projector": DORA | {"targets": r"deepstack_merger_list\.\d+\.linear_fc1"}})
    assert report.parts[0].modules == ["model.visual.deepstack_merger_list.0.linear_fc1"]
    model, _ = build("video_llava")
    report = inject_adapters(model, {"vision": DORA | {"targets": ["video_tower.encoder.layers.0.self_attn.q_proj"]}})
    assert report.parts[0].modules == ["model.video_tower.encoder.layers.0.self_attn.q_proj"]


def test_unused_blocks_of_every_tower_are_skipped():
    model, _ = build("video_llava")  # three blocks a tower; the projector reads layer -2
    adapted = inject_adapters(model, {"vision": DORA}).parts[0].modules
    assert {path.split(".layers.")[0].split(".")[1] for path in adapted} == {"image_tower", "video_tower"}
    assert {path.split(".layers.")[1][0] for path in adapted} == {"0", "1"}


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3", "internvl", "gemma3"])
def test_the_parts_of_a_family_without_an_entry_are_guessed(name, monkeypatch, caplog):
    model, _ = build(name)
    known = architecture_of(model).resolve(model)
    monkeypatch.setattr(type(model.config), "model_type", "unheard_of")
    with caplog.at_level(logging.WARNING, logger="mmdora.models.architectures"):
        guessed = architecture_of(model).resolve(model)
        architecture_of(model)
    assert guessed == known
    assert len(caplog.records) == 1
    assert "model.language_model" in caplog.text or "model.text_model" in caplog.text


def test_an_unused_pooling_head_is_skipped():
    model, _ = build("llava_onevision")
    settings = model.config.to_dict()
    settings["vision_config"]["vision_use_head"] = True
    model = type(model)(type(model.config).from_dict(settings))
    assert [name for name, _ in model.named_modules() if name.endswith("vision_tower.head")]
    part = inject_adapters(model, {"vision": DORA}).parts[0]
    assert part.modules
    assert not [path for path in part.modules + part.skipped if ".head." in path]


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3", "paligemma"])
def test_media_that_the_processor_does_not_support_are_an_error(name, samples):
    _, processor = build(name)
    encoder = Encoder(processor, VideoConfig(num_frames=4))
    for kind in set(samples) - set(FAMILIES[name].media):
        with pytest.raises(SampleError, match="sample 's' of test"):
            encoder.encode(samples[kind])


def test_a_template_that_drops_an_image_is_an_error(samples):
    _, processor = build("qwen2_vl")
    processor.chat_template = processor.chat_template.replace("<|image_pad|>", "")
    with pytest.raises(SampleError, match="0 media placeholders for 1"):
        Encoder(processor).encode(samples["image"])


def test_no_parts_are_guessed_for_a_language_model(caplog):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(UserError, match=r"parts\.vision: LlamaForCausalLM has no such part"):
        inject_adapters(LlamaForCausalLM(config), {"vision": DORA})
    assert not caplog.records
