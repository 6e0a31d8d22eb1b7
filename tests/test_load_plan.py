"""A load plan is complete and changes nothing; models carry one state object."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import mmdora
from mmdora.adapters import adapter_layers
from mmdora.adapters.load_plan import plan_load
from mmdora.adapters.peft_format import read_adapter
from mmdora.adapters.save_load import load_weights
from mmdora.core.errors import UserError
from mmdora.models.model_state import ATTRIBUTE, state_of

DORA = {"method": "dora", "rank": 2}


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True, **options)})
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block["attention"](x, x, x, need_weights=False)[0])


def trained(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    """DoRA inside an attention, beside a head that is trained in full."""
    net = Net()
    mmdora.inject_adapters(net, {"block": DORA, "head": {"method": "full"}})
    mmdora.save_adapter(trained(net), tmp_path)
    return tmp_path


def test_a_plan_changes_nothing(folder):
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    attributes = copy.copy(net.__dict__)
    plan = plan_load(net, read_adapter(folder))
    assert net.__dict__ == attributes
    assert type(net.block["attention"]) is nn.MultiheadAttention
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert set(plan.attentions) == {"block.attention"}
    assert set(plan.specs) == {f"block.attention.{name}_proj" for name in ("q", "k", "v", "out")}
    assert plan.modules_in_full == ["head"]
    assert plan.token_tables == []


def test_loading_applies_the_plan(folder):
    net, x = Net(), torch.randn(2, 5, 8)
    mmdora.load_adapter(net, folder)
    assert {path for path, _ in adapter_layers(net)} == set(plan_load(Net(), read_adapter(folder)).specs)
    again = Net()
    mmdora.load_adapter(again, folder)
    assert torch.equal(again(x), net(x))
    frozen = {name for name, parameter in again.named_parameters() if not parameter.requires_grad}
    assert {f"block.attention.{name}_proj.weight" for name in ("q", "k", "v", "out")} <= frozen
    assert not torch.equal(net(x), Net()(x))


def test_an_attention_that_cannot_be_made_explicit_is_named(folder):
    with pytest.raises(UserError, match=r"block\.attention cannot be adapted: .*add_bias_kv"):
        mmdora.load_adapter(Net(add_bias_kv=True), folder)


@pytest.mark.parametrize("seed", [0, 1])
def test_resuming_dvora_takes_the_shared_matrices_of_the_directory(seed, tmp_path):
    """They are drawn from the seed, so a run that is resumed with another seed has others at first."""

    def injected(seed: int) -> nn.Module:
        net = Net()
        torch.manual_seed(seed)
        mmdora.inject_adapters(net, {"": {"method": "dvora", "rank": 4}})
        return net

    saved, other, x = trained(injected(0)), injected(seed), torch.randn(2, 5, 8)
    mmdora.save_adapter(saved, tmp_path)
    before = [parameter for parameter in other.parameters() if parameter.requires_grad]
    load_weights(other, tmp_path)
    assert torch.equal(other(x), saved(x))
    after = [parameter for parameter in other.parameters() if parameter.requires_grad]
    assert len({id(layer.vera["default"]) for _, layer in adapter_layers(other)}) == 1
    assert all(a is b for a, b in zip(after, before, strict=True)) == (seed == 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_a_model_has_its_own_state(copied):
    net = Net()
    mmdora.inject_adapters(net, {"head": DORA})
    other = copied(net)
    assert state_of(other) == state_of(net)
    mmdora.inject_adapters(other, {"head": DORA}, name="b")
    assert set(state_of(net).adapters) == {"default"}
    assert set(state_of(other).adapters) == {"default", "b"}
    mmdora.set_adapter(net, "default")
    merged = copied(mmdora.merge_adapters(net, reversible=True))
    mmdora.unmerge_adapters(merged)
    assert [path for path, _ in adapter_layers(merged)] == ["head"]
    assert [path for path, _ in adapter_layers(net)] == []
    assert [name for name in net.__dict__ if name.startswith("_mmdora")] == [ATTRIBUTE]
