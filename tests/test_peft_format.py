"""Adapter directories from elsewhere: what is understood, and what is refused before anything changes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import mmdora
from mmdora.adapters import adapter_layers
from mmdora.errors import UserError

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
        save_file(tensors(load_file(file)), file)


def renamed(old: str, new: str):
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def without(part: str):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def test_patterns_dropout_and_training_state_are_pefts(folder):
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
        ({}, renamed("lora_magnitude_vector", "dora_scale"), "is LyCORIS's, whose DoRA normalizes the other axis"),
        ({}, renamed(PREFIX, "lora_unet_"), "is LyCORIS's"),
        ({}, renamed(PREFIX, "model."), r"not of PEFT's layout"),
        ({}, renamed("lora_A.weight", "hada_w1_a"), "of a kind that is not supported"),
        ({}, without("up.lora_magnitude"), r"up.lora_magnitude_vector is missing"),
        ({}, without("down.lora_B"), r"down.lora_B.weight is missing"),
        ({"use_dora": False}, None, r"lora_magnitude_vector is there, but 'use_dora' is false"),
        ({}, renamed("up", "side"), "made for another model: side is not in this model"),
        ({"bias": "all"}, None, "'bias' is 'all'"),
        ({"init_lora_weights": "pissa"}, None, "'init_lora_weights' is 'pissa', which changed the base's weights"),
        ({"lora_bias": True}, None, "'lora_bias' is set"),
        ({"use_qalora": True}, None, "'use_qalora' is set"),
        ({"something_new": {"a": 1}}, None, "'something_new' is set"),
        ({"peft_type": "LOHA"}, None, "'peft_type' must be LORA or MMDORA, found 'LOHA'"),
        ({"lora_alpha": None}, None, "'lora_alpha' must be a number"),
        ({"peft_type": "MMDORA"}, None, "metadata says nothing of"),
    ],
)
def test_foreign_directories_are_refused_whole(folder, config, tensors, message):
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
        ('{"parts": {"up": {"method": "dora", "rank": -1}}}', "metadata is damaged"),
        ("{", "damaged or not a safetensors file"),
    ],
)
def test_damaged_metadata_is_refused(folder, about, message):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"mmdora": about})
    with pytest.raises(UserError, match=message):
        mmdora.load_adapter(Net(), folder)


def test_a_swap_or_resume_refuses_what_does_not_fit(folder):
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
