"""`mmdora merge`: the merged model is the adapted one in plain transformers, or the command fails and marks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import mmdora
from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image
from mmdora.adapters import adapter_layers
from mmdora.apps import merge
from mmdora.core.config import ModelConfig, VideoConfig
from mmdora.core.errors import UserError
from mmdora.models.attention import ExplicitAttention
from mmdora.models.loading import load_model, save_model
from mmdora.models.quantization import quantize_language_model
from tests.families import FAMILIES, Built
from tests.test_runs import command
from tests.tiny_parts import PATCHES, SQUARE, template, text, tokenizer, vision

DORA = {"method": "dora", "rank": 2}


def aria() -> Built:
    """Its projector calls an `nn.MultiheadAttention`."""
    words = tokenizer(image_token="<|img|>")
    config = hf.AriaConfig(
        vision_config=vision("idefics3_vision", image_size=980, patch_size=140),
        text_config=text(words, "aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=words.convert_tokens_to_ids("<|img|>"),
        projector_patch_to_query_dict={49: 4},
    )
    images = hf.AriaImageProcessor(max_image_size=980, split_image=False)
    processor = hf.AriaProcessor(images, words, chat_template=template("<|img|>"), size_conversion={980: 4})
    return hf.AriaForConditionalGeneration(config), processor


def siglip() -> Built:
    """SigLIP's pooling head, which LLaVA does not use, holds an `nn.MultiheadAttention`."""
    words = tokenizer(image_token="<image>")
    config = hf.LlavaConfig(
        text_config=text(words),
        vision_config=vision("siglip_vision_model", vision_use_head=True),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = hf.LlavaProcessor(
        hf.SiglipImageProcessor(size=SQUARE),
        words,
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n"),
    )
    assert PATCHES == 16
    return hf.LlavaForConditionalGeneration(config), processor


BUILDERS = {"aria": aria, "siglip": siglip, "llava": FAMILIES["llava"].build}


def changed(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def write_adapter(folder: Path, name: str, parts: dict[str, Any]) -> Path:
    """Write a base model and an adapter directory that names it."""
    torch.manual_seed(0)
    model, processor = BUILDERS[name]()
    save_model(model, processor, folder / "base")
    model, _ = load_model(ModelConfig(path=str(folder / "base"), dtype="float32"))
    mmdora.inject_adapters(model, parts)
    mmdora.save_adapter(changed(model), folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("aria", {"vision": DORA, "projector": DORA}),
        ("siglip", {"vision": DORA}),  # which does not target the head
        ("siglip", {"model.vision_tower": DORA}),  # which does
    ],
)
def test_multihead_attention_has_its_own_names_again(name, parts, tmp_path, capsys):
    adapter, out = write_adapter(tmp_path, name, parts), tmp_path / "merged"
    assert command("merge", str(adapter), str(out)) == 0
    assert "largest logit difference" in capsys.readouterr().out
    assert not (out / merge.FAILED_MERGE).exists()
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert base.keys() == merged.keys()
    assert any(key.endswith("in_proj_weight") for key in merged)

    model, processor = load_model(ModelConfig(path=str(tmp_path / "base"), dtype="float32"))
    probe = {k: v for k, v in Encoder(processor, VideoConfig()).filler(Image).items() if k != "labels"}
    mmdora.load_adapter(model, adapter)
    with torch.no_grad():
        expected = model.eval()(**probe).logits
        merged = mmdora.merge_adapters(model, reversible=True)
        assert not any(isinstance(module, ExplicitAttention) for module in merged.modules())
        torch.testing.assert_close(merged(**probe).logits, expected, atol=1e-5, rtol=1e-5)
        restored = mmdora.unmerge_adapters(merged)
        assert torch.equal(restored(**probe).logits, expected)
        mmdora.merge_adapters(restored).save_pretrained(tmp_path / "api")
        again = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "api").eval()
        torch.testing.assert_close(again(**probe).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("llava"), "llava", {"vision": DORA, "language": DORA})


def rename_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "mlp.up_proj" in name)
    tensors[name.replace("up_proj", "other")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_a_weight(folder: Path) -> None:
    """The last block of the vision encoder, which LLaVA does not use: the logits are the same."""
    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in tensors if "encoder.layers.2.mlp.fc1.weight" in name)][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_a_weight, r"1 weights are missing when it is loaded again, first \S*mlp.up_proj"),
        (change_a_weight, "1 weights are not those that were saved, first"),
        (truncate, "it cannot be loaded again: its weights are damaged or truncated"),
    ],
)
def test_a_file_that_is_not_the_merged_model_is_an_error(damage, message, adapter, tmp_path, monkeypatch, capsys):
    def save(model: Any, processor: Any, folder: Path) -> None:
        save_model(model, processor, folder)
        damage(folder)

    monkeypatch.setattr(merge, "save_model", save)
    check_failure(adapter, tmp_path / "merged", message, capsys)


@pytest.mark.parametrize("size", [0.3, float("nan")])
def test_logits_that_rounding_does_not_explain_are_an_error(size, adapter, tmp_path, monkeypatch, capsys):
    def wrong(model: nn.Module) -> nn.Module:
        merged = mmdora.merge_adapters(model)
        weight = merged.get_submodule("model.language_model.layers.0.mlp.up_proj").weight
        weight.data += size * torch.randn_like(weight)
        return merged

    monkeypatch.setattr(merge, "merge_adapters", wrong)
    message = r"largest logit difference \S+, over the tolerance \S+ for logits from -\S+ to \S+ in torch.bfloat16"
    check_failure(adapter, tmp_path / "merged", message, capsys)


def check_failure(adapter: Path, out: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Merge, expect exit code 1 and the message, and expect that the output is marked and refused."""
    import re

    assert command("merge", str(adapter), str(out)) == 1
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert "without mmdora" not in captured.out
    assert re.search(message, (out / merge.FAILED_MERGE).read_text())
    assert "Do not use this model" in (out / "README.md").read_text()
    with pytest.raises(UserError, match=r"is a merge that failed; .*MERGE_FAILED.txt says why"):
        load_model(ModelConfig(path=str(out)))


def test_a_merge_that_is_interrupted_is_marked(adapter, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "save_card", stop)
    assert command("merge", str(adapter), str(tmp_path / "merged")) == 130
    assert "did not finish" in (tmp_path / "merged" / merge.FAILED_MERGE).read_text()


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_layers_without_an_adapter_are_dequantized(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model, processor = BUILDERS["llava"]()
    model = model.to(torch.bfloat16).eval()
    quantize_language_model(model, bits)
    mmdora.inject_adapters(model, {"language": {**DORA, "targets": ["q_proj"]}})
    probe = {k: v for k, v in Encoder(processor, VideoConfig()).filler(Image).items() if k != "labels"}
    with torch.no_grad():
        expected = changed(model)(**probe).logits
        merged = mmdora.merge_adapters(model)
        kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
        assert not any(isinstance(module, kinds) for module in merged.modules())
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(merged(**probe).logits, expected, atol=0.03, rtol=0.05)
        merged.save_pretrained(tmp_path)
        again, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_quantized_is_saved_dequantized(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, num_attention_heads=2)).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    settings = hf.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.bfloat16)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")
    mmdora.inject_adapters(model.eval(), {"model": {**DORA, "targets": ["q_proj"]}})
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = changed(model)(input_ids=ids).logits
        merged = mmdora.merge_adapters(model)
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=0.03, rtol=0.05)
        merged.save_pretrained(tmp_path / "merged")
        again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=0.03, rtol=0.05)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


class Net(nn.Module):
    """An attention beside a linear layer, inside a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True), "up": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body["up"](self.body["attention"](x, x, x)[0]))


def test_an_attention_without_a_target_stays_as_it_is(tmp_path):
    """Another part may train it in full, and its saved weights then have the names of the class."""
    net, x = Net(), torch.randn(2, 5, 8)
    before = list(net.state_dict())
    with pytest.raises(UserError, match="nothing in the part is named 'down'"):
        mmdora.inject_adapters(net, {"body": {**DORA, "targets": ["down"]}})
    assert list(net.state_dict()) == before
    parts = {"body": {**DORA, "targets": ["up"]}, "body.attention": {"method": "full"}}
    mmdora.inject_adapters(net, parts)
    assert [path for path, _ in adapter_layers(net)] == ["body.up"]
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    mmdora.save_adapter(net, tmp_path)
    again = Net()
    mmdora.load_adapter(again, tmp_path)
    assert torch.equal(again(x), net(x))
    assert list(mmdora.merge_adapters(again).state_dict()) == before


def test_peft_refuses_an_adapter_inside_multihead_attention(tmp_path):
    """PEFT would skip q, k and v without a word."""
    from peft import PeftModel

    net = Net()
    mmdora.inject_adapters(net, {"": DORA})
    mmdora.save_adapter(changed(net), tmp_path)
    with pytest.raises(Exception, match="MMDORA"):
        PeftModel.from_pretrained(Net(), tmp_path)
    again, x = Net(), torch.randn(2, 5, 8)
    mmdora.load_adapter(again, tmp_path)
    assert torch.equal(again(x), net(x))
    with pytest.raises(UserError, match="PEFT has no plain LoRA"):
        mmdora.export_lora(net, tmp_path / "lora", rank=2)
