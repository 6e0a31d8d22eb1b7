"""Adapter directories of other tools: which are loaded, and which are refused before anything changes."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mmdora
from mmdora.adapters import adapter_layers
from mmdora.core.errors import UserError

PREFIX = "base_model.model."


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x):
        return self.down(self.up(x))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A DoRA adapter as the real PEFT saves it."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["up", "down"], use_dora=True, init_lora_weights=False,
        rank_pattern={"down": 3}, alpha_pattern={"^up": 9}, lora_dropout=0.1,
    )  # fmt: skip
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, config: dict | None = None, tensors=None) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if tensors is not None:
        file = folder / "adapter_model.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(tensors(load_file(file)), file, metadata=metadata)


def renamed(old: str, new: str):
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def without(part: str):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def test_patterns_and_dropout_are_read_as_in_peft(folder):
    net = Net()
    mmdora.load_adapter(net, folder)
    up, down = net.up.specs["default"], net.down.specs["default"]
    assert (up.rank, up.scale, down.rank, down.scale) == (4, 9 / 4, 3, 2)
    assert up.dropout == 0.1
    assert up.peft_dropout  # training goes on as PEFT would
    assert all(p.requires_grad == ("lora_" in n) for n, p in net.named_parameters())


def test_an_old_bin_file_is_read_as_tensors_only(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    net, again = Net(), Net()
    mmdora.load_adapter(net, folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    mmdora.load_adapter(again, folder)
    x = torch.randn(3, 12)
    assert torch.equal(again.eval()(x), net.eval()(x))


class Evil:
    def __reduce__(self):
        return (open, ("stolen", "w"))


def test_a_bin_file_runs_no_code(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(UserError, match=r"adapter_model\.bin: damaged or not a file of tensors"):
        mmdora.load_adapter(Net(), folder)
    assert not (tmp_path / "stolen").exists()


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {},
            renamed("lora_magnitude_vector", "dora_scale"),
            "LyCORIS's format, whose DoRA normalizes the other axis",
        ),
        ({}, renamed(PREFIX, "lora_unet_"), "is in LyCORIS's format"),
        ({}, renamed(PREFIX, "model."), r"not in PEFT's layout"),
        ({}, renamed("lora_A.weight", "hada_w1_a"), "belongs to an adapter type that is not supported"),
        ({}, without("up.lora_magnitude"), r"up.lora_magnitude_vector is missing"),
        ({}, without("down.lora_B"), r"down.lora_B.weight is missing"),
        ({"use_dora": False}, None, r"lora_magnitude_vector exists, but 'use_dora' is false"),
        ({}, renamed("up", "side"), "made for another model: side is not in this model"),
        ({"bias": "all"}, None, "'bias' is 'all'"),
        ({"init_lora_weights": "pissa"}, None, "'init_lora_weights' is 'pissa', which changed the base weights"),
        ({"lora_bias": True}, None, "'lora_bias' is set"),
        ({"use_qalora": True}, None, "'use_qalora' is set"),
        ({"something_new": {"a": 1}}, None, "'something_new' is set"),
        ({"peft_type": "LOHA"}, None, "'peft_type' must be LORA or MMDORA, found 'LOHA'"),
        ({"lora_alpha": None}, None, "'lora_alpha': Input should be a valid number"),
        ({"lora_alpha": float("nan")}, None, "'lora_alpha': Input should be"),
        ({"lora_alpha": 10**400}, None, "'lora_alpha': Input should be"),
        ({"lora_dropout": 1.5}, None, "'lora_dropout': Input should be less than 1"),
        ({"lora_dropout": "x"}, None, "'lora_dropout': Input should be a valid number"),
        ({"alpha_pattern": ["q"]}, None, "'alpha_pattern': Input should be a valid dict"),
        ({"alpha_pattern": {"up": None}}, None, "'alpha_pattern.up': Input should be a valid number"),
        ({"alpha_pattern": {"(": 4}}, None, r"'\(' is not a regular expression"),
        ({"modules_to_save": 5}, None, "'modules_to_save': Input should be a valid list"),
        ({"modules_to_save": ["head"]}, None, "'modules_to_save' names 'head', which is not in this model"),
        ({}, lambda t: t | {"base_model.model.up.lora_A.weight": torch.full((4, 12), float("nan"))}, "contains NaN"),
        ({}, lambda t: t | {"base_model.model.up.lora_A.weight": torch.ones(4, 12).bool()}, "has dtype torch.bool"),
        ({}, lambda t: t | {"base_model.model.up.base_layer.weight": torch.ones(20, 12)}, "belongs to another base"),
        ({"peft_type": "MMDORA"}, None, "metadata has no settings for"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(folder, config, tensors, message):
    change(folder, config, tensors)
    net = Net()
    with pytest.raises(UserError, match=message):
        mmdora.load_adapter(net, folder)
    assert not list(adapter_layers(net))
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("[]", "metadata is damaged"),
        ('{"specs": {"up": {"rank": "many"}}}', "metadata is damaged"),
        (
            '{"specs": {"up": {"rank": 9, "alpha": 1}}}',
            r"up.lora_A.weight has shape \[4, 12\]; this model needs \[9, 12\]",
        ),
        ('{"specs": {"up": {"rank": 4, "alpha": 1, "dropout": 3}}}', "metadata is damaged"),
        ('{"specs": {"up": {"rank": 4, "alpha": 1, "use_vera": true}}}', "up.vera_lambda_d is missing"),
        ('{"parts": {"up": {"method": "dora", "rank": -1}}}', "metadata is damaged"),
        ("{", "damaged or not a safetensors file"),
    ],
)
def test_damaged_metadata_is_refused(folder, about, message):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"mmdora": about})
    with pytest.raises(UserError, match=message):
        mmdora.load_adapter(Net(), folder)


@pytest.mark.parametrize("content", [b"", b"a", b"t.", b"\x80\x02.", b"\x80\x02J", b"\x80\x02h\x05."])
def test_a_garbled_bin_file_is_refused(folder, content):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model\.bin: damaged or not a file of tensors"):
        mmdora.load_adapter(Net(), folder)


@pytest.mark.parametrize("value", [torch.ones(4, 12).to_sparse(), torch.ones(4, 12, device="meta"), 3])
def test_a_bin_file_without_dense_tensors_is_refused(folder, value):
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors | {f"{PREFIX}up.lora_A.weight": value}, folder / "adapter_model.bin")
    net = Net()
    with pytest.raises(UserError, match=r"adapter_model.bin: damaged|up.lora_A.weight' is not a dense tensor"):
        mmdora.load_adapter(net, folder)
    assert not list(adapter_layers(net))


def test_a_deeply_nested_config_is_refused(folder):
    (folder / "adapter_config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="not valid JSON"):
        mmdora.load_adapter(Net(), folder)


def test_a_refused_directory_leaves_multihead_attention_unchanged(tmp_path):
    net = nn.Sequential(nn.MultiheadAttention(8, 2))
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 2}})
    mmdora.save_adapter(net, tmp_path)
    change(tmp_path, tensors=lambda t: t | {f"{PREFIX}0.q_proj.lora_A.weight": torch.zeros(2, 3)})
    other = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(UserError, match=r"0.q_proj.lora_A.weight has shape \[2, 3\]"):
        mmdora.load_adapter(other, tmp_path)
    assert type(other[0]) is nn.MultiheadAttention


def test_an_embedding_that_peft_saves_with_its_base_weight_is_loaded(tmp_path):
    config = LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    torch.manual_seed(0)
    base, ids = LlamaForCausalLM(config).eval(), torch.randint(0, 30, (1, 6))
    again = copy.deepcopy(base)
    lora = LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    peft_model = get_peft_model(base, lora)
    peft_model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    mmdora.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(ids).logits, peft_model(ids).logits, atol=1e-5, rtol=1e-5)
    mmdora.save_adapter(again, tmp_path / "mmdora")


def test_a_part_trained_in_full_is_saved_with_buffers_and_tied_weights(tmp_path):
    net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))
    again = copy.deepcopy(net)
    mmdora.inject_adapters(net, {"0": {"method": "dora"}, "1": {"method": "full"}})
    net(3 + torch.randn(64, 12))
    mmdora.save_adapter(net, tmp_path / "norm")
    mmdora.load_adapter(again, tmp_path / "norm")
    x = torch.randn(4, 12)
    assert torch.equal(again.eval()(x), net.eval()(x))
    config = LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    other = copy.deepcopy(model)
    mmdora.inject_adapters(model, {"lm_head": {"method": "full"}})
    mmdora.save_adapter(model, tmp_path / "head")
    mmdora.load_adapter(other, tmp_path / "head")
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_a_swap_that_does_not_fit_changes_nothing(folder):
    net = Net()
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 4}})
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    change(
        folder, tensors=lambda t: {k: v[:, :5].clone() if k.endswith("up.lora_A.weight") else v for k, v in t.items()}
    )
    with pytest.raises(UserError, match=r"up.lora_A.weight has shape \[4, 5\]"):
        mmdora.swap_adapter(net, folder)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_a_rank_above_both_sides_works(tmp_path):
    net, x = Net(), torch.randn(3, 12)
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 64, "use_rslora": True}})
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    mmdora.save_adapter(net, tmp_path)
    again = Net()
    mmdora.load_adapter(again, tmp_path)
    assert torch.equal(again(x), net(x))
    torch.testing.assert_close(mmdora.merge_adapters(again)(x), net(x), atol=1e-4, rtol=1e-4)
