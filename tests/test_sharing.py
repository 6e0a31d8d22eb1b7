"""Siblings that read the same input share xAᵀ; the numbers are those of layers that are alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel

import mmdora
from mmdora.adapters import adapter_layers, functional, linear
from mmdora.adapters.linear import SharedInput


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return torch.softmax(self.q_proj(x) @ self.k_proj(y).mT, -1) @ self.v_proj(y)


def adapted(**settings) -> Attention:
    net = Attention()
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 4} | settings})
    randomize(net)
    return net


def randomize(net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def alone(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    for _, layer in adapter_layers(net):
        layer.__dict__["shared"] = None
    return net


def run(net: nn.Module, *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    net.zero_grad()
    out = net(*inputs)
    out = out if isinstance(out, Tensor) else out.last_hidden_state
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in inputs), *(p.grad for p in net.parameters() if p.requires_grad)]


def same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """How many layers each shared product served."""
    served: list[int] = []
    real = functional.SharedDownFunction.apply

    class Counting:
        @staticmethod
        def apply(x, *a):
            served.append(len(a))
            return real(x, *a)

    monkeypatch.setattr(linear, "SharedDownFunction", Counting)
    return served


def test_one_product_serves_all_siblings(products):
    net, x = adapted(rank_pattern={"k_proj": 2}), torch.randn(2, 5, 12)
    same(run(net, x), run(alone(net), x))
    assert products == [3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(net, x)
    assert products == [3, 3]


def test_cross_attention_does_not_share_what_it_does_not_read(products):
    net, x, y = adapted(), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    for _ in range(3):
        same(run(net, x, y), run(alone(net), x, y))
    assert products == [3]  # tried once


def test_dropout_rows_inference_and_disabled_adapters_do_not_share(products):
    x = torch.randn(2, 5, 12)
    run(adapted(dropout=0.5), x)
    net = adapted()
    with mmdora.disable_adapters(net):
        net(x)
    with mmdora.adapters_by_row(net, ["default", None]):
        net(x)
    with torch.inference_mode():
        torch.testing.assert_close(net(x.clone()), alone(net)(x))
    assert products == []


def test_an_input_changed_in_place_is_read_again():
    net, x = adapted(), torch.randn(2, 5, 12)
    q = net.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(net.k_proj(x), alone(net).k_proj(x))
    torch.testing.assert_close(net.q_proj(x) - q, (alone(net).q_proj(x) - q))


def test_copies_and_pickles_share_among_themselves(products):
    net, x = adapted(), torch.randn(2, 5, 12)
    net.q_proj(x)  # leaves results for the siblings that were not called
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other.q_proj.shared, SharedInput)
        assert other.q_proj.shared is other.k_proj.shared is other.v_proj.shared
        assert other.q_proj.shared.layers == [other.q_proj, other.k_proj, other.v_proj]
        products.clear()
        same(run(other, x), run(alone(net), x))
        assert products == [3]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_model_is_the_same(checkpointing, products):
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaModel(config)
    mmdora.inject_adapters(model, {"": {"method": "dora", "rank": 4}})
    randomize(model)
    x = torch.randn(2, 7, 16)

    def forward(net):
        plain = lambda x: net(inputs_embeds=x, use_cache=False).last_hidden_state  # noqa: E731
        module = nn.Module()
        module.net = net
        module.forward = (lambda x: checkpoint(plain, x, use_reentrant=False)) if checkpointing else plain
        return module

    expected = run(forward(alone(model)), x)
    same(run(forward(model), x), expected)
    assert set(products) == {2, 3}
