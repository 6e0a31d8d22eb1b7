"""Parts that cannot be composed are errors that name the part and say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mmdora.core.config import ModelConfig
from mmdora.core.errors import UserError
from mmdora.models.loading import load_model, save_model
from mmdora.models.vision_encoders import VISION_ENCODERS
from tests.tiny_models import CHAT_TEMPLATE, LAYERS, write_language_model, write_tokenizer, write_tower

TEXT_ONLY = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("towers") / "clip", "clip")


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("language_models") / "llama", "llama")


@pytest.fixture
def llama(saved_llama, tmp_path):
    """A language model whose files a test may change."""
    return Path(shutil.copytree(saved_llama, tmp_path / "llama"))


def compose(clip, language_model, **settings):
    encoder = {"type": "clip", "name": str(clip)}
    config = {"vision_encoder": encoder, "language_model": {"path": str(language_model)}, **settings}
    return load_model(ModelConfig.model_validate(config))


def write_encoder_decoder(folder, kind):
    if kind == "bart":
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=300, **sizes, **heads))
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=300, **sizes))
    model.save_pretrained(folder)
    write_tokenizer(folder)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_an_encoder_decoder_is_refused(kind, clip, tmp_path):
    write_encoder_decoder(tmp_path, kind)
    with pytest.raises(UserError, match=r"is an encoder-decoder.*use a decoder-only model"):
        compose(clip, tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping; set it to null"),
        ("opt", {"word_embed_proj_dim": 16}, "embeddings have width 16 and its layers 32"),
    ],
)
def test_a_language_model_that_the_class_would_change_is_refused(family, changes, message, clip, tmp_path):
    write_language_model(tmp_path, family, **changes)
    with pytest.raises(UserError, match=message):
        compose(clip, tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Granite", {"logits_scaling": 4.0}, "does not apply this family's scaling or capping of logits"),
        ("Phi", {}, "needs a head that is one linear layer without bias"),
        ("Mamba", {}, "cannot run it"),
    ],
)
def test_a_family_without_a_plain_decoder_and_head_is_refused(family, changes, message, clip, tmp_path):
    config = getattr(transformers, f"{family}Config")(**LAYERS, **changes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match=message):
        compose(clip, tmp_path)


@pytest.mark.parametrize(
    ("template", "special", "message"),
    [
        (None, {}, "has no chat template"),
        (TEXT_ONLY, {}, "does not write <image>.*model.chat_template"),
        (CHAT_TEMPLATE.replace("<video>", ""), {}, "does not write <video>"),
        (CHAT_TEMPLATE, {"eos_token": None}, "has no eos_token"),
    ],
)
def test_a_tokenizer_without_what_a_composed_model_needs_is_refused(template, special, message, clip, llama):
    write_tokenizer(llama, template, **special)
    with pytest.raises(UserError, match=message):
        compose(clip, llama)


def test_a_chat_template_in_the_config_replaces_a_text_only_one(clip, llama):
    write_tokenizer(llama, TEXT_ONLY)
    (llama / "own.jinja").write_text(CHAT_TEMPLATE)
    _, processor = compose(clip, llama, chat_template=str(llama / "own.jinja"))
    assert processor.chat_template == CHAT_TEMPLATE
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token  # it had no padding token


def test_a_missing_language_model(clip):
    with pytest.raises(UserError, match=r"model.language_model.path \(./nowhere\): cannot load it"):
        compose(clip, "./nowhere")


def test_a_feature_layer_that_the_tower_does_not_have(clip, saved_llama):
    with pytest.raises(UserError, match=r"model.vision_feature_layer: .* has hidden states -3 to 2, not -7"):
        compose(clip, saved_llama, vision_feature_layer=-7)


def test_a_resnet_of_open_clip_is_refused():
    with pytest.raises(UserError, match=r"RN50.*use a ViT, SigLIP, EVA or ConvNeXt tower"):
        VISION_ENCODERS["open_clip"]("RN50")


@pytest.mark.parametrize(
    ("kind", "family", "arguments", "message"),
    [
        ("dinov2", "dinov2_registers", {}, "is a 'dinov2_with_registers' model"),
        ("siglip", "clip", {}, "is a 'clip_vision_model' model"),
        ("clip", "clip", {"pretrained": "v1"}, "is a directory, but 'pretrained' is a revision"),
        ("clip", "clip", {"pretrained": "v1", "model_config": {}}, "'pretrained' must be null"),
    ],
)
def test_a_tower_of_another_family_or_with_clashing_settings_is_refused(kind, family, arguments, message, tmp_path):
    write_tower(tmp_path, family)
    with pytest.raises(UserError, match=message):
        VISION_ENCODERS[kind](str(tmp_path), **arguments)


def test_a_naflex_tower_is_refused(tmp_path):
    config = transformers.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.Siglip2VisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a 'siglip2_vision_model' model, but siglip2 towers come from siglip"):
        VISION_ENCODERS["siglip2"](str(tmp_path))


def edit(weights: Path, change) -> None:
    tensors = load_file(weights)
    change(tensors, sorted(name for name in tensors if ".layers.1." in name)[0])
    save_file(tensors, weights, metadata={"format": "pt"})


DAMAGES = {
    "its weights are damaged or truncated": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    r"layers\.1\.\S+ is missing": lambda file: edit(file, lambda tensors, name: tensors.pop(name)),
    r"layers\.1\.\S+ has shape \[3\], the model needs \[32\]": lambda file: edit(
        file, lambda tensors, name: tensors.update({name: tensors[name][:3].clone()})
    ),
    "no file named model.safetensors": lambda file: file.unlink(),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damaged_weights_are_an_error(reason, clip, llama, tmp_path):
    shutil.copytree(clip, tmp_path / "tower")
    for part, load in (
        ("language_model.path", lambda: compose(clip, llama)),
        ("vision_encoder", lambda: VISION_ENCODERS["clip"](str(tmp_path / "tower"))),
    ):
        DAMAGES[reason](tmp_path / ("llama" if part.startswith("language") else "tower") / "model.safetensors")
        with pytest.raises(UserError, match=rf"model\.{part}.*{tmp_path}.*{reason}") as error:
            load()
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory) -> str:
    """The name of a tiny architecture that open_clip can build."""
    import open_clip

    vision = {"width": 32, "layers": 1, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    file = tmp_path_factory.mktemp("open_clip") / "tiny-damaged.json"
    file.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)
    return file.stem


@pytest.mark.parametrize("kept", [0, 10, -1000])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_damaged_weights_of_an_open_clip_tower_are_an_error(kind, kept, tiny_open_clip, tmp_path):
    file = tmp_path / f"weights.{kind}"
    tensors = {"visual.proj": torch.zeros(99_999)}
    torch.save(tensors, file) if kind == "pt" else save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:kept])
    message = f"cannot load {tiny_open_clip} with pretrained .*weights are damaged or truncated"
    with pytest.raises(UserError, match=message) as error:
        VISION_ENCODERS["open_clip"](tiny_open_clip, str(file))
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice to disable safe loading


def test_an_unknown_open_clip_tag_is_an_error_that_lists_the_tags():
    with pytest.raises(UserError, match=r"pretrained 'opnai': it is neither a file nor a tag of .* \(openai, "):
        VISION_ENCODERS["open_clip"]("ViT-B-32", "opnai")


def test_a_vision_language_model_is_refused_as_language_model(clip):
    with pytest.raises(UserError, match=r"language_model\.path \(assets/tiny-llava\): .* name it in model\.path"):
        compose(clip, "assets/tiny-llava")


def test_the_attention_implementation_is_chosen_or_refused(clip, saved_llama, tmp_path):
    write_language_model(tmp_path, "gemma2")  # it has no sdpa and can be composed all the same
    model, processor = compose(clip, tmp_path)
    save_model(model, processor, tmp_path / "whole")
    for gemma in (model, load_model(ModelConfig(path=str(tmp_path / "whole")))[0]):
        assert gemma.config.text_config._attn_implementation == "eager"
    for attention in ("sdpa", "eager"):
        model, _ = compose(clip, saved_llama, attention=attention)
        parts = (model.model.language_model, model.model.vision_tower)
        assert [part.config._attn_implementation for part in parts] == [attention, attention]
    if not transformers.utils.is_flash_attn_2_available():
        with pytest.raises(UserError, match=r"model\.attention: "):
            compose(clip, saved_llama, attention="flash_attention_2")


@pytest.mark.parametrize("text", ["{", '{"image_processor_type": "Nope"}'])
def test_a_damaged_image_processor_is_an_error(text, clip, tmp_path):
    tower = Path(shutil.copytree(clip, tmp_path / "clip"))
    (tower / "preprocessor_config.json").write_text(text)
    with pytest.raises(UserError, match=r"model.vision_encoder \(clip\): cannot load the image processor of"):
        VISION_ENCODERS["clip"](str(tower))


def test_a_missing_tower():
    with pytest.raises(UserError, match=r"model.vision_encoder \(siglip\): cannot load './nowhere'"):
        VISION_ENCODERS["siglip"]("./nowhere")
