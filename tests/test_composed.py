"""Composed models: every vision encoder, projector and language model, trained, saved and reloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, Dinov2Model

import mmdora
from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from mmdora.core.config import ModelConfig, VideoConfig
from mmdora.models.loading import load_model, save_model
from mmdora.models.projectors import IdentityLinear
from mmdora.models.vision_encoders import VISION_ENCODERS
from tests.media import write_image, write_video
from tests.tiny_models import LANGUAGE_MODELS, TIMM, VIT, write_language_model, write_tower

OPEN_CLIP = {"embed_dim": 16, "vision_cfg": {"width": 32, "layers": 2, "head_width": 8, "patch_size": 8}}
OPEN_CLIP["vision_cfg"]["image_size"] = 32
# type, source (a kind of `write_tower` or an OpenCLIP description), number of patches, whether it has a class token
TOWERS = {
    "clip": ("clip", "clip", 16, True),
    "clip_whole": ("clip", "clip_whole", 16, True),
    "siglip": ("siglip", "siglip", 16, False),
    "siglip2": ("siglip2", "siglip", 16, False),
    "dinov2": ("dinov2", "dinov2", 4, True),  # its preprocessor resizes to 16 px
    "open_clip_vit": ("open_clip", OPEN_CLIP, 16, True),
    "open_clip_siglip": ("open_clip", TIMM["siglip"], 16, False),
    "open_clip_eva": ("open_clip", TIMM["eva"], 16, True),
    "open_clip_convnext": ("open_clip", TIMM["convnext"], 16, False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("composed")
    write_language_model(path / "llama", "llama")
    write_tower(path / "clip", "clip")
    write_image(path / "picture.png")
    write_video(path / "clip.mp4")
    return path


def compose(folder: Path, tower: str = "clip", language: str = "llama", **settings):
    """Return (model, processor) of a key of TOWERS and a language model of `folder`, in fp32."""
    kind, source, _, _ = TOWERS[tower]
    encoder = {"type": kind, "name": "tiny", "model_config": source}
    if isinstance(source, str):
        encoder = {"type": kind, "name": str(folder / source)}
        if not (folder / source).exists():
            write_tower(folder / source, source)
    language_model = {"path": str(folder / language)}
    config = {"vision_encoder": encoder, "language_model": language_model, "dtype": "float32", **settings}
    return load_model(ModelConfig.model_validate(config))


def batches(folder: Path, processor) -> list[dict]:
    """Encode samples with one image, two images and a video, each with a question and its answer."""
    image, video = Image(folder / "picture.png"), Video(folder / "clip.mp4")
    answer = Message("assistant", (Text("a dog"),))
    encoder = Encoder(processor, VideoConfig(num_frames=2))
    return [
        encoder.encode(Sample("s", (Message("user", (*media, Text("what is it?"))), answer), "t"))
        for media in ((image,), (image, image), (video,))
    ]


@torch.no_grad()
def logits(model, samples: list[dict]) -> list[torch.Tensor]:
    return [model.eval()(**sample).logits for sample in samples]


def assert_trains(model, samples: list[dict]) -> None:
    """Put adapters into all three parts; every B and magnitude gets a gradient from images and from videos."""
    parts = ("vision", "projector", "language")
    mmdora.inject_adapters(model, {part: {"method": "dora", "rank": 2} for part in parts})
    model.train()
    for sample in samples:
        model.zero_grad()
        loss = model(**sample).loss
        loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and ".lora_A" not in n}
        assert all(any(key in name for name in trained) for key in ("vision_tower", "projector", "language_model"))
        assert torch.isfinite(loss)
        assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_language_model_generates_reloads_and_trains(family, folder, tmp_path):
    write_language_model(folder / family, family)
    model, processor = compose(folder, language=family)
    samples = batches(folder, processor)
    before = logits(model, samples)
    prompt = {k: v for k, v in samples[0].items() if k != "labels"}
    answer = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 3
    save_model(model, processor, tmp_path)
    reloaded = logits(AutoModelForImageTextToText.from_pretrained(tmp_path), samples)
    assert all(torch.equal(a, b) for a, b in zip(reloaded, before, strict=True))
    encoded_again = batches(folder, AutoProcessor.from_pretrained(tmp_path))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(encoded_again, samples, strict=True) for k in a)
    assert_trains(model, samples)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_vision_encoder_is_read_by_patches_and_trains(tower, folder):
    _, _, patches, has_class_token = TOWERS[tower]
    model, processor = compose(folder, tower)
    assert model.config.vision_feature_select_strategy == ("default" if has_class_token else "full")
    assert processor.num_image_tokens == patches + has_class_token
    samples = batches(folder, processor)
    image = model.config.image_token_id
    assert (samples[1]["input_ids"] == image).sum() == 2 * (patches + 1)  # each with one newline embedding
    size = model.config.vision_config.image_size
    assert samples[1]["pixel_values"].shape[-2:] == (size, size)
    assert_trains(model, samples)


def test_statistics_come_from_the_preprocessor_or_the_family(folder):
    _, processor = compose(folder, "dinov2")
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    _, processor = compose(folder, "siglip")
    assert list(processor.video_processor.image_std) == [0.5, 0.5, 0.5]


def test_dinov2_at_another_resolution_is_the_same_function(folder):
    tower = VISION_ENCODERS["dinov2"](str(write_tower(folder / "dino", "dinov2"))).eval()
    reference, x = Dinov2Model.from_pretrained(folder / "dino").eval(), torch.randn(2, 3, 16, 16)
    assert tower.config.image_size == 16
    with torch.no_grad():
        assert torch.equal(tower(x).last_hidden_state, reference(x).last_hidden_state)


@pytest.mark.parametrize("kind", TIMM)
def test_open_clip_weights_load_into_the_timm_tower(kind, tmp_path):
    import open_clip

    description = {**TIMM[kind], "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "layers": 1}}
    description["text_cfg"] |= {"heads": 2}
    name = f"tiny-{kind}"
    (tmp_path / f"{name}.json").write_text(json.dumps({**description, "custom_text": True}))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    source = open_clip.create_model(name, device="cpu").eval()
    for module in source.modules():
        for bias in (getattr(module, "q_bias", None), getattr(module, "v_bias", None)):
            if bias is not None:
                torch.nn.init.normal_(bias)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    tower = VISION_ENCODERS["open_clip"](name, str(tmp_path / "weights.pt")).eval()
    x = torch.randn(2, 3, tower.config.image_size, tower.config.image_size)
    tower.save_pretrained(tmp_path / "tower")
    with torch.no_grad():
        states = tower(x).hidden_states
        expected = source.visual.trunk.forward_features(x)
        if kind == "convnext":
            expected = expected.flatten(2).transpose(1, 2)
        last = states[-1] if kind == "convnext" else tower.trunk.norm(states[-1])
        torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
        reloaded = AutoModel.from_pretrained(tmp_path / "tower").eval()
        assert torch.equal(reloaded(x).last_hidden_state, states[-1])
        if kind == "siglip":
            siglip = tower.to_siglip().eval()(x, output_hidden_states=True).hidden_states
            for state, converted in zip(states, siglip, strict=True):
                torch.testing.assert_close(converted, state, atol=1e-5, rtol=1e-5)
    assert len(states) == 3


def test_the_pooler_of_a_coca_tower_is_removed(tmp_path):
    import open_clip

    vision = {**OPEN_CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-pooled.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-pooled.json")
    source = open_clip.create_model("tiny-pooled", device="cpu").eval()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    tower = VISION_ENCODERS["open_clip"]("tiny-pooled", str(tmp_path / "weights.pt")).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = source.visual.transformer(source.visual._embeds(x))
        torch.testing.assert_close(tower(x).hidden_states[-1], expected, atol=1e-5, rtol=1e-5)
    assert not [name for name, _ in tower.named_parameters() if "attn_pool" in name]


def test_the_same_config_gives_the_same_weights_and_an_adapter_fits(folder, tmp_path):
    first, processor = compose(folder, "open_clip_vit", projector="linear")
    base = {k: v.clone() for k, v in first.state_dict().items()}
    torch.manual_seed(123)  # as in another run
    second, _ = compose(folder, "open_clip_vit", projector="linear")
    assert all(torch.equal(second.state_dict()[k], v) for k, v in base.items())
    samples = batches(folder, processor)
    mmdora.inject_adapters(first, {"language": {"method": "dora", "rank": 2}, "projector": {"method": "full"}})
    with torch.no_grad():
        for name, p in first.named_parameters():
            if "lora_B" in name or "projector.linear_1.weight" in name:
                p.normal_(std=0.1)
    mmdora.save_adapter(first, tmp_path)
    mmdora.load_adapter(second, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(logits(second, samples), logits(first, samples), strict=True))


def test_gradient_checkpointing_of_a_timm_tower(folder):
    model, processor = compose(folder, "open_clip_eva")
    sample = batches(folder, processor)[0]

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model.train()(**sample).loss.backward()
        return model.model.vision_tower.trunk.blocks[0].attn.qkv.weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable()
    assert model.model.vision_tower.gradient_checkpointing
    torch.testing.assert_close(gradient(), plain)


def test_a_linear_projector_is_one_layer_also_after_reloading(folder, tmp_path):
    model, processor = compose(folder, projector="linear")
    samples = batches(folder, processor)
    projector = model.model.multi_modal_projector
    x = torch.randn(2, 5, VIT["hidden_size"])
    assert torch.equal(projector(x), projector.linear_1(x))
    assert [n for n, _ in projector.named_parameters()] == ["linear_1.weight", "linear_1.bias"]
    save_model(model, processor, tmp_path)
    reloaded, _ = load_model(ModelConfig(path=str(tmp_path), dtype="float32"))
    assert isinstance(reloaded.model.multi_modal_projector.linear_2, IdentityLinear)
    assert all(torch.equal(a, b) for a, b in zip(logits(reloaded, samples), logits(model, samples), strict=True))
    assert_trains(reloaded, samples)
