"""Checkpoints in the layout of LLaVA's own code convert to Hugging Face models that compute the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
)

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text
from mmdora.conversion.llava import convert_llava
from mmdora.core.errors import UserError
from tests.llava_files import PATCH, ROWS, SIDE, WIDTH, Parts, run, write_base, write_checkpoint, write_tower
from tests.media import write_image

SMALL_TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


@pytest.fixture(scope="module")
def tower(parts, tmp_path_factory) -> Path:
    return write_tower(tmp_path_factory.mktemp("tower"), parts)


@pytest.fixture
def checkpoint(parts, tmp_path) -> Path:
    return write_checkpoint(tmp_path / "llava-v1.5-tiny", parts, parts.whole())


def convert(*arguments: object, code: int = 0) -> None:
    run("convert", *arguments, code=code)


def check_same(out: Path, parts: Parts, language: nn.Module | None = None) -> None:
    """Check that the converted model, in plain transformers, gives the logits of the parts computed by hand."""
    model, loading = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(out)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    image = PILImage.effect_mandelbrot((12, 8), (-2, -1, 1, 1), 50).convert("RGB")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=text, images=image, return_tensors="pt")
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert image_token == ROWS == model.config.image_token_id
    assert (inputs["input_ids"] == image_token).sum() == (SIDE // PATCH) ** 2
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    assert logits.shape[-1] % 64 == 0
    expected = parts.logits(inputs["input_ids"], image_token, inputs["pixel_values"], language)
    torch.testing.assert_close(logits[..., :ROWS], expected, atol=1e-5, rtol=1e-5)


def test_a_whole_checkpoint_computes_the_same(parts, tower, checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out", "--vision-tower", tower)
    check_same(tmp_path / "out", parts)


def test_a_safetensors_checkpoint_with_its_own_tower(parts, tower, checkpoint, tmp_path):
    for file in checkpoint.glob("pytorch_model*"):
        file.unlink()
    trained = Parts()
    for p in trained.tower.parameters():
        nn.init.normal_(p, std=0.4)
    prefix = "model.vision_tower.vision_tower.vision_model."
    of_tower = {f"{prefix}{name}": tensor for name, tensor in trained.tower.state_dict().items()}
    save_file(parts.whole() | of_tower, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(parts.config(model_type="llava_llama")))
    convert(checkpoint, tmp_path / "out", "--vision-tower", tower)
    check_same(tmp_path / "out", trained)


def test_the_tower_may_be_a_whole_clip_and_the_dtype_is_kept(parts, tower, tmp_path):
    """CLIP is published with its text encoder, and LLaVA's shards are in half precision."""
    clip = CLIPModel(CLIPConfig(vision_config=parts.tower.config.to_dict(), text_config=SMALL_TEXT))
    clip.vision_model.load_state_dict(parts.tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    shutil.copy(tower / "preprocessor_config.json", tmp_path / "clip")
    half = {name: tensor.half() for name, tensor in parts.whole().items()}
    converted = convert_llava(write_checkpoint(tmp_path / "half", parts, half), str(tmp_path / "clip"))
    assert {p.dtype for p in converted.model.parameters()} == {torch.float16}
    for name, tensor in parts.tower.state_dict().items():
        assert torch.equal(converted.model.model.vision_tower.state_dict()[name], tensor.half())


def test_tied_embeddings(tower, tmp_path):
    parts = Parts()
    parts.language.lm_head.weight = parts.language.model.embed_tokens.weight
    tensors = parts.whole()
    del tensors["lm_head.weight"]
    folder = write_checkpoint(tmp_path / "tied", parts, tensors, tie_word_embeddings=True)
    convert(folder, tmp_path / "out", "--vision-tower", tower)
    check_same(tmp_path / "out", parts)


@pytest.mark.parametrize("base_kind", ["language model", "whole"])
def test_a_projector_is_converted_with_its_base(parts, tower, checkpoint, tmp_path, base_kind):
    stage1 = tmp_path / "pretrain"
    stage1.mkdir()
    torch.save(parts.projector_tensors(), stage1 / "mm_projector.bin")
    (stage1 / "config.json").write_text(json.dumps(parts.config(image_aspect_ratio="square")))
    base = write_base(tmp_path / "vicuna", parts) if base_kind == "language model" else checkpoint
    convert(stage1, tmp_path / "out", "--vision-tower", tower, "--base", base)
    check_same(tmp_path / "out", parts)


@pytest.mark.parametrize(("dora", "old"), [(False, True), (True, False)])
def test_a_lora_run_is_merged(parts, tower, tmp_path, dora, old):
    base = write_base(tmp_path / "vicuna", parts)
    tuned = LlamaForCausalLM.from_pretrained(base)
    names = ["q_proj", "v_proj", "down_proj"]
    tuned = get_peft_model(tuned, LoraConfig(r=4, lora_alpha=8, target_modules=names, use_dora=dora))
    for name, p in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    folder = tmp_path / "lora"
    tuned.save_pretrained(folder)
    if old:
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    torch.save(parts.projector_tensors("base_model.model.model.mm_projector."), folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(parts.config()))
    convert(folder, tmp_path / "out", "--vision-tower", tower, "--base", base)
    check_same(tmp_path / "out", parts, tuned.eval())


def test_a_llama_gets_a_new_projector(parts, tower, tmp_path):
    """The start of LLaVA's first stage. The projector is the same each time."""
    base = write_base(tmp_path / "vicuna", parts)
    convert(base, tmp_path / "out", "--vision-tower", tower)
    started = Parts()
    projector = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").model.multi_modal_projector
    for layer, new in ((started.projector[0], projector.linear_1), (started.projector[2], projector.linear_2)):
        layer.load_state_dict(new.state_dict())
    assert 0 < projector.linear_1.weight.abs().max() <= WIDTH**-0.5
    check_same(tmp_path / "out", started)
    again = convert_llava(base, str(tower)).model.model.multi_modal_projector
    assert torch.equal(again.linear_2.weight, projector.linear_2.weight)


def test_samples_are_encoded_with_the_converted_processor(tower, checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out", "--vision-tower", tower)
    encoder = Encoder(AutoProcessor.from_pretrained(tmp_path / "out"))
    image = Image(write_image(tmp_path / "a.png", size=(20, 10)))
    messages = (Message("user", (image, Text("What?"))), Message("assistant", (Text("A dog."),)))
    encoded = encoder.encode(Sample("s", messages, "test"))
    tokenizer = encoder.processor.tokenizer
    assert encoded["input_ids"][0, 0] == tokenizer.bos_token_id
    assert encoded["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert tokenizer.decode(encoded["labels"][0][encoded["labels"][0] != -100]).strip() == "A dog.</s>"


def test_images_are_padded_or_cropped_as_the_checkpoint_says(parts, tower, checkpoint):
    """`image_aspect_ratio: pad` pads with the mean colour; `square` crops."""
    processor = convert_llava(checkpoint, str(tower)).processor
    wide = PILImage.new("RGB", (32, 8), (255, 255, 255))
    pixels = processor.image_processor(wide, return_tensors="pt")["pixel_values"][0]
    assert pixels[:, 0].abs().max() < 0.02  # the mean, normalized
    assert pixels[:, SIDE // 2].min() > 1
    (checkpoint / "config.json").write_text(json.dumps(parts.config(image_aspect_ratio="square")))
    cropped = convert_llava(checkpoint, str(tower)).processor.image_processor(wide, return_tensors="pt")
    assert cropped["pixel_values"].min() > 1


def test_one_error_names_all_wrong_tensors_and_nothing_is_written(parts, tower, tmp_path, capsys):
    tensors = parts.whole()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["model.mm_projector.0.weight"] = torch.zeros(24, 17)
    folder = write_checkpoint(tmp_path / "broken", parts, tensors)
    convert(folder, tmp_path / "out", "--vision-tower", tower, code=2)
    message = capsys.readouterr().err
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "unexpected: model.layers.7.mlp.up_proj.weight" in message
    assert "wrong shape: model.mm_projector.0.weight [24, 17], not [24, 16]" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_mpt"}, "'model_type' is 'llava_mpt'; supported: llava, llava_llama"),
        ({"mm_projector_type": "linear"}, "'mm_projector_type' is 'linear'; supported: mlp2x_gelu"),
        ({"image_aspect_ratio": "anyres"}, "'image_aspect_ratio' is 'anyres'"),
        ({"mm_use_im_start_end": True}, "'mm_use_im_start_end' is True"),
        ({"mm_hidden_size": 32}, "has hidden size 16, but .* was trained with 32"),
        ({"vocab_size": ROWS - 1}, f"its tokenizer has {ROWS} tokens"),
        ({"num_attention_heads": 5}, "config.json"),
    ],
)
def test_an_unsupported_setting_is_refused(parts, tower, checkpoint, changes, message):
    (checkpoint / "config.json").write_text(json.dumps(parts.config(**changes)))
    with pytest.raises(UserError, match=message):
        convert_llava(checkpoint, str(tower))


def test_a_wrong_directory_is_an_error(parts, tower, checkpoint, tmp_path):
    with pytest.raises(UserError, match="leave out --base"):
        convert_llava(checkpoint, str(tower), checkpoint)
    with pytest.raises(UserError, match="no such directory"):
        convert_llava(checkpoint, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--vision-tower: cannot load"):
        convert_llava(checkpoint, str(checkpoint))
    shutil.copy(tower / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match="not a checkpoint of LLaVA's own code"):
        convert_llava(tmp_path, str(tower))
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"are missing: pytorch_model-00002-of-00002\.bin"):
        convert_llava(checkpoint, str(tower))
    for file in checkpoint.glob("pytorch_model*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no mm_projector\.bin"):
        convert_llava(checkpoint, str(tower))
    torch.save(parts.projector_tensors(), checkpoint / "mm_projector.bin")
    with pytest.raises(UserError, match="name the model that it was trained on with --base"):
        convert_llava(checkpoint, str(tower))


def test_a_bin_file_runs_no_code(tower, checkpoint):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (checkpoint / "ran",))

    torch.save({"lm_head.weight": Hostile()}, checkpoint / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UserError, match="damaged, or not a file of tensors"):
        convert_llava(checkpoint, str(tower))
    assert not (checkpoint / "ran").exists()
