"""A model may change the output of an adapted layer in place, in every way in which it may change a plain layer's."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, Llama4ForCausalLM, Llama4TextConfig

import mmdora
from mmdora.adapters.ops import autograd
from mmdora.models.attention import ExplicitAttention

from .test_layers import LAYERS, OWN, Model, Net, adapted, build, gpt_oss, llama4, mixtral, randomize

LINEAR = ("linear", "linear without bias", "fused qkv", "Conv1D")
CASES = [(kind, method, "auto") for kind in [*LAYERS, *OWN] for method in ("lora", "dora", "magnitude")]
CASES += [
    (kind, method, forward)
    for kind in LINEAR
    for method in ("lora", "dora", "dvora")
    for forward in ("exact", "merged")
]


def settings(method: str, forward: str) -> dict[str, object]:
    keys = {"magnitude": {}, "dvora": {"rank": 4}}.get(method, {"rank": 4, "alpha": 6})
    return {"method": method, "targets": ["layer"]} | keys | ({} if method == "magnitude" else {"forward": forward})


def add(y: Tensor) -> Tensor:
    return y.add_(1)


def multiply(y: Tensor) -> Tensor:
    return y.mul_(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))


def change_a_view(y: Tensor) -> Tensor:
    y.flatten(0)[::2].mul_(3)
    return y


def zero_unseen(y: Tensor) -> Tensor:
    """Change the values without autograd's knowledge, as a kernel does that writes into its input."""
    y.data.zero_()
    return y


CHANGES = (add, multiply, change_a_view, torch.relu_, zero_unseen)


def gradients(model: nn.Module, out: Tensor, x: Tensor | None = None) -> list[Tensor]:
    direction = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    inputs = [p for p in model.parameters() if p.requires_grad] + ([] if x is None else [x])
    return list(torch.autograd.grad((out * direction).sum(), inputs))


def check(model: nn.Module, *inputs: Tensor, tolerance: float = 1e-6) -> None:
    """Compare with the same model whose output is copied before it is changed."""
    x = inputs[0].requires_grad_() if inputs[0].is_floating_point() else None
    for change in CHANGES:
        expected = gradients(model, change(model(*inputs).clone()), x)
        actual = gradients(model, change(model(*inputs)), x)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("kind", "method", "forward"), CASES)
def test_the_output_of_every_layer(kind, method, forward):
    net, x = build(kind)
    mmdora.inject_adapters(net, {"": settings(method, forward)})
    randomize(net)
    check(net, x)


@pytest.mark.parametrize("method", ["lora", "dora", "magnitude"])
@pytest.mark.parametrize("make", [mixtral, gpt_oss, llama4])
def test_the_output_of_experts(make, method):
    torch.manual_seed(0)
    block, inputs = make()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    net = Model(block)
    keys = {} if method == "magnitude" else {"rank": 2, "alpha": 3}
    mmdora.inject_adapters(net, {"": {"method": method, "targets": ["experts.gate_up_proj", "down_proj"]} | keys})
    randomize(net)
    check(net, *inputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype, bias):
    torch.manual_seed(0)
    net, x = Net(nn.Linear(12, 20, bias=bias)), torch.randn(3, 5, 12)
    half = adapted(net.to(dtype))
    check(half, x.to(dtype))
    net = adapted(net.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(net, x)


def test_dropout_by_either_rule():
    net, x = build("linear without bias")
    for peft_dropout in (False, True):
        dropping = adapted(net, dropout=0.5, peft_dropout=peft_dropout).train()
        torch.manual_seed(1)
        expected = gradients(dropping, dropping(x).clone().add_(1))
        torch.manual_seed(1)
        for a, b in zip(gradients(dropping, dropping(x).add_(1)), expected, strict=True):
            assert torch.equal(a, b)


class Changing(nn.Module):
    """Layers that read one tensor, whose outputs are changed in place before the next layer is called."""

    def __init__(self, bias: bool):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 8, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(8, 12, bias=bias)
        self.in_place = True

    def changed(self, y: Tensor, factor: float) -> Tensor:
        return (y if self.in_place else y.clone()).mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        q = self.changed(self.q_proj(x), 2.0)
        k = self.changed(self.k_proj(x), 0.5)
        v = self.changed(self.v_proj(x), -1.0)
        return self.changed(self.o_proj((q @ k.mT).softmax(-1) @ v), 3.0)


@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("forward", ["exact", "merged"])
def test_outputs_of_a_shared_input_and_recomputed_outputs(forward, bias, checkpointed):
    """`checkpointed` is the value of `use_reentrant`, or None without gradient checkpointing."""
    torch.manual_seed(0)
    net = Changing(bias)
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 4, "forward": forward}})
    randomize(net)
    x = torch.randn(2, 9, 12)
    results = []
    for in_place in (False, True):
        net.in_place = in_place
        inputs = x.clone().requires_grad_()
        net.zero_grad()
        out = net(inputs) if checkpointed is None else checkpoint(net, inputs, use_reentrant=checkpointed)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append([out, inputs.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("saved", ["mm", "all products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forward", ["exact", "merged"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_selective_checkpointing_that_saves_products(method, forward, dtype, saved):
    """A saved product must not change afterwards, neither visibly nor through an output that shares its memory."""
    products = [torch.ops.aten.mm.default] + ([torch.ops.aten.addmm.default] if saved == "all products" else [])
    for bias in (False, True):
        torch.manual_seed(0)
        net = Changing(bias).to(dtype)
        mmdora.inject_adapters(net, {"": {"method": method, "rank": 4, "forward": forward}})
        randomize(net)
        x, results = torch.randn(2, 40, 12, dtype=dtype), []
        for context in (None, partial(create_selective_checkpoint_contexts, products)):
            inputs = x.clone().requires_grad_()
            net.zero_grad()
            keywords = {} if context is None else {"context_fn": context}
            out = net(inputs) if context is None else checkpoint(net, inputs, use_reentrant=False, **keywords)
            out.square().sum().backward()
            results.append([out, inputs.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(actual, expected)


def test_explicit_attention():
    torch.manual_seed(0)
    net = nn.Sequential(ExplicitAttention.from_multihead(nn.MultiheadAttention(12, 2, bias=False, batch_first=True)))
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 4}})
    randomize(net)
    net.forward = lambda x: net[0](x, x, x)[0]
    check(net, torch.randn(2, 5, 12))


@pytest.mark.parametrize("bias", [True, False])
def test_the_triton_kernels(bias, monkeypatch):
    kernels = pytest.importorskip("mmdora.adapters.ops.triton_kernels", reason="Triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(autograd, "kernels_for", lambda device: kernels)
    torch.manual_seed(0)
    net = adapted(Net(nn.Linear(12, 20, bias=bias)).to(device))
    x = torch.randn(7, 12, device=device)
    plain = gradients(net, torch.relu(net(x)))
    for a, b in zip(gradients(net, torch.relu_(net(x))), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_the_output_is_the_only_new_activation():
    """A copy of the output would be needed in a backward pass only."""
    from mmdora.planning.activations import StorageTracker

    net, x = adapted(Net(nn.Linear(12, 20, bias=False))), torch.randn(4000, 12)
    peaks = []
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled), StorageTracker([x, *net.parameters()]) as tracker:
            net(x)
        peaks.append(tracker.peak / (4000 * 20 * 4))
    assert peaks[0] < 1.3
    assert 2 <= peaks[1] < 2.3


# Models of transformers


def llama4_model() -> nn.Module:
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        attention_chunk_size=16,
    )  # fmt: skip
    return Llama4ForCausalLM(config)


def gemma3n_model() -> nn.Module:
    config = Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0], sliding_window=8,
    )  # fmt: skip
    return Gemma3nForCausalLM(config)


@pytest.mark.parametrize("make", [llama4_model, gemma3n_model])
def test_models_that_change_outputs_in_place_train_as_in_peft(make, tmp_path):
    torch.manual_seed(0)
    base = make().eval()
    net = copy.deepcopy(base)
    targets = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj)"
    mmdora.inject_adapters(net, {"model": {"method": "dora", "rank": 4, "targets": targets}})
    randomize(net)
    ids = torch.randint(0, 64, (2, 11))
    mmdora.save_adapter(net, tmp_path)
    in_peft = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    own, theirs = (model(input_ids=ids, labels=ids).loss for model in (net, in_peft))
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)
    own.backward()
    theirs.backward()
    gradients = {n: p.grad for n, p in in_peft.named_parameters() if p.requires_grad}
    compared = 0
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            other = f"base_model.model.{name}"
            gradient = gradients[f"{other}.weight" if f"{other}.weight" in gradients else other]
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared == len(gradients)
