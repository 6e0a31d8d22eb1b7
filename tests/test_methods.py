"""Which layers a config's parts select, which parameters each method trains, and which settings it refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

import mmdora
from mmdora.adapters import adapter_layers
from mmdora.core.errors import UserError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 12, bias=False) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False)

    def forward(self, x):
        x = x + F.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)
        return x + self.down_proj(F.gelu(self.up_proj(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def specs(net: nn.Module) -> dict[str, tuple[int, bool]]:
    return {path: (layer.specs["default"].rank, layer.specs["default"].use_dora) for path, layer in adapter_layers(net)}


def train(net: nn.Module, steps: int = 3) -> set[str]:
    """Train a few steps, and return the names of the parameters that changed."""
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 5, 12)).square().sum().backward()
        optimizer.step()
    return {n for n, p in net.named_parameters() if not torch.equal(p, start[n])}


def test_magnitude_and_direction_can_have_different_targets():
    """As in Table 6 of the paper, with m on more layers than V. A layer with V but without m has LoRA."""
    net = Net()
    parts = {"method": "dora", "rank": 4, "targets": ["q_proj", "v_proj"], "magnitude_targets": ["q_proj", "up_proj"]}
    report = mmdora.inject_adapters(net, {"": parts})
    found = specs(net)
    assert {p.rpartition(".")[2]: s for p, s in found.items()} == {
        "q_proj": (4, True),
        "v_proj": (4, False),
        "up_proj": (0, True),
    }
    assert report.trainable == 2 * (4 * 24 + 12 + 4 * 24 + 20)
    assert train(net) == {n for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "dora", "dvora", "magnitude", "full"])
def test_a_method_trains_its_own_parameters_only(method, tmp_path):
    net, x = Net(), torch.randn(4, 5, 12)
    before = net(x)
    mmdora.inject_adapters(net, {"": {"method": method}})
    torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-5)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    kinds = {n.split(".")[3] for n in trained if "lora" in n or "vera" in n}
    assert (
        kinds
        == {
            "lora": {"lora_A", "lora_B"},
            "dora": {"lora_A", "lora_B", "lora_magnitude_vector"},
            "dvora": {"vera_lambda_d", "vera_lambda_b", "lora_magnitude_vector"},
            "magnitude": {"lora_magnitude_vector"},
            "full": set(),
        }[method]
    )
    assert train(net) == trained
    mmdora.save_adapter(net, tmp_path)
    again = Net()
    mmdora.load_adapter(again, tmp_path)
    assert torch.equal(again(x), net(x))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    torch.testing.assert_close(mmdora.merge_adapters(again)(x), net(x), atol=1e-5, rtol=1e-5)


def test_dvora_shares_its_frozen_matrices(tmp_path):
    """y = m/‖V‖ ⊙ Vx with V = W + Λb B Λd A. All layers have the same tensors A and B, also after loading."""
    net = Net()
    mmdora.inject_adapters(net, {"": {"method": "dvora", "rank": 6}})
    train(net)
    mmdora.save_adapter(net, tmp_path)
    again = Net()
    mmdora.load_adapter(again, tmp_path)
    for model in (net, again):
        assert len({id(layer.vera["default"]) for _, layer in adapter_layers(model)}) == 1
    layer = net.blocks[1].down_proj
    shared, x = layer.vera["default"], torch.randn(3, 20)
    d, b, m = (p.double() for p in layer.adapter_tensors("default").values())
    v = layer.weight.double() + b[:, None] * shared.vera_B[:12].double() @ (d[:, None] * shared.vera_A[:, :20].double())
    expected = x.double() @ (m[:, None] * v / v.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=1e-5)
    assert sum(name.endswith("vera_A") for name in load_file(tmp_path / "adapter_model.safetensors")) == 1


def test_patterns_and_excludes():
    net = Net()
    parts = {
        "method": "dora",
        "rank": 4,
        "alpha": 8,
        "exclude": ["blocks.1.k_proj", "down_proj"],
        "rank_pattern": {"up_proj": 2, r"blocks\.1\.[qv]_proj": 7},
        "alpha_pattern": {"up_proj": 6},
    }
    mmdora.inject_adapters(net, {"": parts})
    assert {p: s.rank for p, s in ((p, layer.specs["default"]) for p, layer in adapter_layers(net))} == {
        "blocks.0.q_proj": 4,
        "blocks.0.k_proj": 4,
        "blocks.0.v_proj": 4,
        "blocks.0.up_proj": 2,
        "blocks.1.q_proj": 7,
        "blocks.1.v_proj": 7,
        "blocks.1.up_proj": 2,
    }
    assert net.blocks[0].up_proj.specs["default"].scale == 3
    assert net.blocks[0].q_proj.specs["default"].scale == 2


def test_targets_by_regex_are_inside_the_part():
    net = Net()
    mmdora.inject_adapters(net, {"blocks.1": {"method": "dora", "targets": r"[qk]_proj"}})
    assert set(specs(net)) == {"blocks.1.q_proj", "blocks.1.k_proj"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"method": "magnitude", "rank": 4}, r"parts.blocks.rank: the method 'magnitude' has no such setting"),
        ({"method": "full", "targets": ["q_proj"]}, r"parts.blocks.targets: the method 'full' has no such setting"),
        ({"method": "lora", "magnitude_targets": ["q_proj"]}, r"parts.blocks.magnitude_targets: the method 'lora'"),
        ({"method": "frozen", "learning_rate": 0.1}, r"parts.blocks.learning_rate: the method 'frozen'"),
        ({"method": "dora", "exclude": ["q_porj"]}, r"parts.blocks.exclude: nothing in the part is named 'q_porj'"),
        ({"method": "dora", "exclude": ".*"}, r"parts.blocks.targets: 'all-linear' matches no layer"),
        ({"method": "dora", "rank_pattern": {"(": 4}}, r"'\(' is not a regular expression"),
        ({"method": "dora", "rank_pattern": {"q_proj": 0}}, r"parts.blocks.rank_pattern.q_proj"),
    ],
)
def test_an_invalid_setting_is_named_and_changes_nothing(parts, message):
    net = Net()
    with pytest.raises(UserError, match=message):
        mmdora.inject_adapters(net, {"blocks": parts})
    assert not list(adapter_layers(net))
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"": {"method": "full"}, "blocks.0": {"method": "lora"}}, "in full, and parts.blocks.0 adapts it"),
        ({"blocks": {"method": "full"}, "blocks.0": {"method": "full"}}, "parts.blocks trains blocks.0 in full"),
    ],
)
def test_full_and_low_rank_do_not_overlap(parts, message):
    with pytest.raises(UserError, match=message):
        mmdora.inject_adapters(Net(), parts)


@pytest.mark.parametrize("name", ["train", "keys", "_parameters", "a.b", "a b", ""])
def test_an_invalid_adapter_name_is_refused(name):
    net = Net()
    with pytest.raises(UserError, match="an adapter cannot be named"):
        mmdora.inject_adapters(net, {"": {"method": "dora"}}, name=name)
    assert not list(adapter_layers(net))


@pytest.mark.parametrize(("method", "share"), [("lora", 4.61), ("dora", 4.63)])
def test_the_papers_shares_of_llava_1_5_7b(method, share):
    """r = 128 on every linear layer of the language model, the projector in full (Table 4 of the paper).

    On the meta device, where seven billion parameters take no memory.
    """
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(LlavaConfig(vision_config=vision, text_config=text))
    parts = {"language": {"method": method, "rank": 128, "alpha": 256}, "projector": {"method": "full"}}
    report = mmdora.inject_adapters(model, parts)
    assert len(report.parts[0].modules) == 224
    assert abs(report.percent - share) < 0.01
