"""In bf16 and fp16, no layer loses more of its adapter's magnitude, output or gradients than PEFT does."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import mmdora

from .test_layers import Net, reference

KINDS = {
    "linear": (lambda: nn.Linear(256, 192), (24, 16, 256)),
    "linear without bias": (lambda: nn.Linear(192, 256, bias=False), (300, 192)),
    "Conv1D": (lambda: Conv1D(192, 256), (2, 150, 256)),
    "conv1d": (lambda: nn.Conv1d(24, 40, 3, padding=1), (4, 24, 70)),
    "conv2d": (lambda: nn.Conv2d(16, 48, 3, stride=2, padding=1, bias=False), (4, 16, 20, 20)),
    "conv3d": (lambda: nn.Conv3d(8, 32, 2), (3, 8, 7, 7, 7)),
    "embedding": (lambda: nn.Embedding(300, 128), (8, 64)),
}
HALVES = [torch.bfloat16, torch.float16]
# Both round the same sums; where they round equally often, chance decides which error is larger in the fourth digit.
CHANCE = 1.02


def build(kind: str, dtype: torch.dtype, seed: int = 0) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    make, shape = KINDS[kind]
    net = Net(make()).to(dtype)
    if isinstance(net.layer, Conv1D):
        nn.init.normal_(net.layer.weight, std=0.05)
        nn.init.normal_(net.layer.bias)
    return net, torch.randint(300, shape) if kind == "embedding" else torch.randn(shape).to(dtype)


def with_gain(base: Net, gain: float | Tensor, low_rank: bool, forward: str = "auto") -> Net:
    """Return the layer with a DoRA adapter whose magnitude is `gain` times the norm of W + sBA."""
    net = copy.deepcopy(base)
    mmdora.inject_adapters(
        net, {"": {"method": "dora", "targets": ["layer"], "rank": 8, "alpha": 8, "forward": forward}}
    )
    layer, tensors = net.layer, net.layer.adapter_tensors("default")
    a, b, m = tensors.values()
    if low_rank:  # ‖sBA‖ is about 0.3 ‖W‖
        for factor in (a, b):
            factor.data = torch.randn_like(factor)
        size = (b.flatten(1) @ a.flatten(1)).norm() / layer.matrix().float().norm()
        b.data *= 0.3 / size
    v = layer.matrix().double() + b.flatten(1).double() @ a.flatten(1).double()
    m.data = (gain * v.norm(dim=1)).float().view(m.shape)
    return net


def in_peft(base: Net, net: Net, **options) -> nn.Module:
    """Return PEFT's layer with the same adapter; by its default, adapters of half-precision models are in fp32."""
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["layer"], use_dora=True)
    model = get_peft_model(copy.deepcopy(base), config, **options)
    for name, parameter in model.named_parameters():
        for suffix, tensor in net.layer.adapter_tensors("default").items():
            if suffix.split(".")[0] in name:
                parameter.data.copy_(tensor.detach().view(parameter.shape))
    return model


def results(model: nn.Module, tensors: list[Tensor], x: Tensor, dy: Tensor | None = None) -> list[Tensor]:
    """Return the output and the gradients of `tensors` and, if it has one, of x."""
    inputs = x.detach().clone().requires_grad_() if x.is_floating_point() else x
    out = model(inputs)
    dy = out.new_ones(out.shape) if dy is None else dy.to(out.dtype)
    leaves = [*tensors, inputs] if x.is_floating_point() else tensors
    return [out.detach(), *torch.autograd.grad(out, leaves, dy)]


def errors(base: Net, net: Net, x: Tensor, **options) -> dict[str, tuple[float, float]]:
    """Return the errors of mmdora and PEFT for the output and each gradient, relative to float64."""
    peft_model = in_peft(base, net, **options)
    dy = torch.randn(net(x).shape).to(base.layer.weight.dtype)
    x64 = x.double().requires_grad_() if x.is_floating_point() else x
    out, leaves = reference(base.layer, net.layer, x64)
    inputs = [*leaves, x64] if x.is_floating_point() else leaves
    exact = [out.detach(), *torch.autograd.grad(out, inputs, dy.double())]
    own = results(net, list(net.layer.adapter_tensors("default").values()), x, dy)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    named = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    ordered = [next(p for n, p in named.items() if key in n) for key in ("_A", "_B", "magnitude")]
    assert len(trained) == 3
    theirs = results(peft_model, ordered, x, dy)
    names = ("y", "dA", "dB", "dm", "dx")
    found = {}
    for name, a, b, c in zip(names, own, theirs, exact, strict=False):
        size = c.norm().clamp_min(1e-12)
        found[name] = tuple(float((t.double().reshape(c.shape) - c).norm() / size) for t in (a, b))
    return found


@pytest.mark.parametrize("deviation", [1e-4, 1e-3, 3e-3, 1e-2])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_small_gains_are_as_exact_as_in_peft(kind, dtype, deviation):
    for low_rank in (False, True):
        for sign in (1, -1):
            base, x = build(kind, dtype)
            for name, (own, theirs) in errors(base, with_gain(base, 1 + sign * deviation, low_rank), x).items():
                assert own <= CHANCE * theirs, (name, low_rank, sign, own, theirs)
