"""Layers that read one tensor work together, and nobody can tell but by the time it takes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.whisper.modeling_whisper import WhisperAttention

import mmdora
from mmdora.adapters import adapter_layers
from mmdora.adapters.layers.siblings import same_reads
from mmdora.adapters.ops import linear_function

DORA = {"method": "dora", "rank": 4, "alpha": 6}


class Attention(nn.Module):
    """One head; `values` says whether what v computes is used."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.q = nn.Linear(12, 8, bias=bias)
        self.k = nn.Linear(12, 8, bias=bias)
        self.v = nn.Linear(12, 10, bias=bias)
        self.values = True

    def forward(self, x):
        q = self.q(x)
        k = self.k(x)
        v = self.v(x)
        scores = (q @ k.mT).softmax(-1)
        return scores @ v if self.values else scores


def adapted(module: nn.Module, **settings) -> nn.Module:
    torch.manual_seed(0)
    mmdora.inject_adapters(module, {"": DORA | settings})
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def parted(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    for _, layer in adapter_layers(other):
        if layer.siblings is not None:
            layer.siblings.part()
    return other


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many layers each call of the function computed."""
    found: list[int] = []
    real = linear_function.AdaptedLinearFunction.apply

    def counting(x, forms, *rest):
        found.append(len(forms))
        return real(x, forms, *rest)

    monkeypatch.setattr(linear_function.AdaptedLinearFunction, "apply", counting)
    return found


def run(module: nn.Module, *inputs: torch.Tensor, forward=None) -> list[torch.Tensor | None]:
    """The output, the inputs' gradients and those of all parameters."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    torch.manual_seed(1)  # for dropout
    out = (module if forward is None else forward)(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in inputs), *(p.grad for p in module.parameters() if p.requires_grad)]


def same(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> None:
    for left, right in zip(a, b, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("forward", ["exact", "merged"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "lora"},
        {"rank_pattern": {"k": 7}, "alpha_pattern": {"v": 11}},
        {"targets": ["q", "v"]},
        {"targets": ["q", "k"], "magnitude_targets": ["k", "v"]},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_together_as_alone(settings, forward, calls):
    net = adapted(Attention(bias="rank_pattern" in settings), forward=forward, **settings)
    x = torch.randn(2, 40, 12)
    alone = run(parted(net), x)
    assert calls == [1] * len(calls)
    calls.clear()
    same(run(net, x), alone)
    assert calls == [2 if settings.get("targets") == ["q", "v"] else 3]


def test_an_output_that_nobody_uses_gives_no_gradient():
    net = adapted(Attention())
    net.values = False
    x = torch.randn(2, 40, 12)
    together = run(net, x)
    same(together, run(parted(net), x))
    assert net.v.lora_A["default"].grad is None


def test_llama_and_whisper(calls):
    """gate and up read the same x; k and v do where q reads another."""
    mlp = adapted(LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2)))
    x = torch.randn(2, 5, 12)
    together = run(mlp, x)
    assert calls == [2, 1]
    same(together, run(parted(mlp), x))
    calls.clear()
    cross = adapted(WhisperAttention(embed_dim=12, num_heads=2, is_decoder=True, config=_whisper()))
    seen = torch.randn(2, 7, 12)
    together = run(cross, x, seen)
    assert calls == [1, 2, 1]
    same(together, run(parted(cross), x, seen))


def _whisper():
    from transformers import WhisperConfig

    config = WhisperConfig(d_model=12, decoder_attention_heads=2)
    config._attn_implementation = "sdpa"
    return config


def test_checkpointing_autocast_and_compile_compute_the_same():
    net = adapted(Attention(bias=True))
    x = torch.randn(2, 9, 12)
    expected = run(net, x)
    same(run(net, x, forward=lambda x: checkpoint(net, x, use_reentrant=False)), expected)
    same(run(net, x, forward=torch.compile(net, backend="aot_eager", fullgraph=True)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone, together = run(parted(net), x), run(net, x)
    assert together[0].dtype == torch.bfloat16
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left, right, atol=0.05, rtol=0.05)


def test_outside_the_parent_a_layer_is_alone(calls):
    """So nothing that a layer computed for another is ever handed out after a change."""
    net = adapted(Attention())
    x = torch.randn(2, 9, 12)
    net.q(x)
    net.k.lora_B["default"].data += 1
    same([net.k(x).detach()], [parted(net).k(x).detach()])
    with torch.no_grad():
        net(x)
    assert set(calls) == {1}


def test_a_hook_that_changes_one_layers_input_is_heeded():
    net = adapted(Attention())
    for module in (net, parted(net)):
        module.k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    other = parted(net)
    x = torch.randn(2, 9, 12)
    same(run(net, x), run(other, x))


def test_an_error_in_the_parent_leaves_nothing_behind():
    net = adapted(Attention())
    net.v.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(torch.randn(2, 9, 12))
    assert net.q.siblings.held is None
    assert not net.q.siblings.inside


def test_several_adapters_rows_and_copies():
    net = adapted(Attention())
    mmdora.inject_adapters(net, {"": DORA | {"targets": ["q", "k"]}}, name="b")
    assert len(net.q.siblings.layers) == 3  # q and k work together under b, all three under the first
    x = torch.randn(2, 9, 12)
    for name in ("default", "b"):
        mmdora.set_adapter(net, name)
        same(run(net, x), run(parted(net), x))
    with mmdora.adapters_by_row(net, ["default", "b"]):
        same([net(x).detach()], [parted(net)(x).detach()])
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.q.siblings.layers == [other.q, other.k, other.v]
        assert other.q.siblings is not net.q.siblings
        same(run(other, x), run(net, x))


def test_merging_ends_it_and_unmerging_brings_it_back(calls):
    net = adapted(Attention())
    x = torch.randn(2, 9, 12)
    before = run(net, x)
    merged = mmdora.merge_adapters(net, reversible=True)
    assert not merged._forward_hooks
    assert not merged._forward_pre_hooks
    torch.testing.assert_close(merged(x), before[0], atol=1e-5, rtol=1e-5)
    calls.clear()
    same(run(mmdora.unmerge_adapters(merged), x), before)
    assert calls == [3]


class Reassigned(Attention):
    def forward(self, x):
        q = self.q(x)
        x = x + 1
        return q, self.k(x), self.v(x)


class InPlace(Attention):
    def forward(self, x):
        q = self.q(x)
        x.add_(1)
        k = self.k(x)
        x[0] = 0
        return q, k, self.v(x)


class Branching(Attention):
    def forward(self, x, y=None):
        q = self.q(x)
        if y is None:
            return q
        k, v = self.k(x), self.v(x)
        return q, k, v


class Perhaps(Attention):
    def forward(self, x, y=None):
        return self.q(x), (self.k(x) if y is None else None), [self.v(x) for _ in range(2)]


class Twice(Attention):
    def forward(self, x, y):
        q, k = self.q(x), self.k(x)
        return q, k, self.q(y), self.v(self.q(x))


def test_who_reads_the_same():
    def found(kind: type[nn.Module]) -> list[tuple[str, ...]]:
        return [names for names in same_reads(kind) if len(names) > 1]

    assert found(Attention) == [("q", "k", "v")]
    assert found(Reassigned) == [("k", "v")]
    assert found(InPlace) == []
    assert found(Branching) == [("k", "v")]
    assert found(Perhaps) == []
    assert found(Twice) == []
    assert same_reads(type("Made", (Attention,), {"forward": eval("lambda self, x: (self.q(x), self.k(x))")})) == ()
