"""In bf16 and fp16, no layer loses more of its adapter's magnitude, output or gradients than PEFT does."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import mmdora
from mmdora.adapters.ops.autograd import MergedWeightFunction

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
# Both round the same sums. Where they round equally often, chance decides which error is larger: in the third digit in
# half precision, and altogether for what both sum in fp32.
CHANCE, FLOOR = 1.02, 1e-6


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


def assert_no_worse(found: dict[str, tuple[float, float]], *case: object) -> None:
    for name, (own, theirs) in found.items():
        assert own <= max(CHANCE * theirs, FLOOR), (name, own, theirs, *case)


@pytest.mark.parametrize("deviation", [1e-4, 1e-3, 3e-3, 1e-2])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_small_gains_are_as_exact_as_in_peft(kind, dtype, deviation):
    for low_rank in (False, True):
        for sign in (1, -1):
            base, x = build(kind, dtype)
            assert_no_worse(errors(base, with_gain(base, 1 + sign * deviation, low_rank), x), low_rank, sign)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("forward", ["exact", "merged"])
def test_adapters_in_the_models_dtype_are_no_better_in_peft(forward, dtype):
    """The merged forward rounds W + sBA once more, but PEFT rounds A, B and m."""
    for kind in ("linear", "linear without bias"):
        base, x = build(kind, dtype)
        net = with_gain(base, 1.003, low_rank=True, forward=forward)
        assert_no_worse(errors(base, net, x, autocast_adapter_dtype=False), kind)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_gain_that_half_precision_cannot_represent_arrives(dtype):
    """1.003 is 1.0 in bf16; the mean output grows by 0.3% all the same."""
    for kind in KINDS:
        base, x = build(kind, dtype)
        net = with_gain(base, 1.003, low_rank=False)
        with torch.no_grad():
            before, own, theirs = (model(x).double() for model in (base, net, in_peft(base, net)))
        bias = getattr(base.layer, "bias", None)
        if bias is not None:
            shape = [1, -1] + [1] * (before.dim() - 2) if kind.startswith("conv") else [-1]
            before, own, theirs = (y - bias.detach().double().view(shape) for y in (before, own, theirs))
        gain, in_peft_gain = (float((before * y).sum() / before.square().sum()) for y in (own, theirs))
        # The Conv1D has biases larger than its products, so that both lose a part of the gain when they round.
        assert abs(gain - 1.003) < (2e-3 if kind == "Conv1D" else 1e-4), (kind, gain)
        assert abs(gain - 1.003) < abs(in_peft_gain - 1.003) + 5e-5, (kind, gain, in_peft_gain)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gains_far_from_one_are_exact(kind, dtype):
    base, x = build(kind, dtype)
    gains = torch.tensor([0.0, 1e-3, -1.0, 2.0, -30.0, 0.3, 1.0, 7.0], dtype=torch.float64)
    rows = with_gain(base, 1.0, low_rank=True).layer.magnitude("default").numel()
    net = with_gain(base, gains.repeat(rows // 8 + 1)[:rows], low_rank=True)
    expected, _ = reference(base.layer, net.layer, x)
    out = net(x)
    # One rounding of the base output, which includes the bias, and one of the result.
    eps = torch.finfo(dtype).eps
    channel = 1 if kind.startswith("conv") else -1
    sizes = net.layer.gain("default").abs().detach().double().clamp_min(1.0)
    sizes = sizes.view([-1] + [1] * (out.dim() - 2)) if channel == 1 else sizes
    with torch.no_grad():
        limit = eps * (sizes * base(x).double().abs() + expected.abs() + 0.01)
    assert ((out.double() - expected).abs() <= limit).all()
    zero = out.movedim(channel, -1)[..., ::8]
    bias = getattr(base.layer, "bias", None)
    wanted = 0.0 if bias is None else bias[::8].double()
    assert ((zero.double() - wanted).abs() <= eps * (zero.abs() + 0.1)).all()


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(96, 64), nn.Linear(96, 32, bias=False), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_layers_that_share_an_input_are_as_exact_as_alone(dtype):
    torch.manual_seed(0)
    base = Siblings().to(dtype)
    net = copy.deepcopy(base)
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 8, "alpha": 8}})
    x = torch.randn(300, 96).to(dtype)
    for (name, layer), out in zip(net.named_children(), net(x.requires_grad_()), strict=True):
        layer.lora_B["default"].data = 0.1 * torch.randn(layer.lora_B["default"].shape)
        layer.lora_magnitude_vector["default"].data = 1.003 * layer.fresh_norm("default")
        del out, name
    for (name, layer), out in zip(net.named_children(), net(x), strict=True):
        expected, leaves = reference(getattr(base, name), layer, x)
        dy = torch.randn(out.shape).to(dtype)
        tensors = list(layer.adapter_tensors("default").values())
        own = torch.autograd.grad(out, tensors, dy, retain_graph=True)
        exact = torch.autograd.grad(expected, leaves, dy.double())
        assert (
            float((out.detach().double() - expected.detach()).norm() / expected.detach().norm())
            < 0.7 * torch.finfo(dtype).eps
        )
        for gradient, wanted, limit in zip(own, exact, (FLOOR, FLOOR, torch.finfo(dtype).eps), strict=True):
            assert float((gradient.double() - wanted).norm() / wanted.norm()) < limit, name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dropout_scale_and_magnitude_alone(dtype):
    torch.manual_seed(0)
    base, x = build("linear", dtype)
    net = copy.deepcopy(base)
    settings = {"method": "dora", "targets": ["layer"], "rank": 4, "alpha": 64, "dropout": 0.5}
    mmdora.inject_adapters(net, {"": settings})
    layer = net.layer
    layer.lora_B["default"].data = 0.02 * torch.randn(layer.lora_B["default"].shape)
    layer.lora_magnitude_vector["default"].data = 1.003 * layer.fresh_norm("default")
    torch.manual_seed(1)
    out = net.train()(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5).double()
    a, b, m = (t.detach().double().requires_grad_() for t in layer.adapter_tensors("default").values())
    norm = (layer.weight.double() + 16 * b @ a).detach().norm(dim=1)
    expected = m / norm * (x.double() @ layer.weight.double().T + 16 * dropped @ a.T @ b.T) + layer.bias.double()
    assert (
        float((out.detach().double() - expected.detach()).norm() / expected.detach().norm())
        < 0.7 * torch.finfo(dtype).eps
    )
    dy = torch.randn(out.shape).to(dtype)
    own = torch.autograd.grad(out, list(layer.adapter_tensors("default").values()), dy)
    for gradient, wanted, limit in zip(
        own, torch.autograd.grad(expected, [a, b, m], dy.double()), (FLOOR, FLOOR, torch.finfo(dtype).eps), strict=True
    ):
        assert float((gradient.double() - wanted).norm() / wanted.norm()) < limit
    magnitude = copy.deepcopy(base)
    mmdora.inject_adapters(magnitude, {"": {"method": "magnitude", "targets": ["layer"]}})
    magnitude.layer.lora_magnitude_vector["default"].data *= 1.003
    expected, _ = reference(base.layer, magnitude.layer, x)
    assert float((magnitude(x).double() - expected).norm() / expected.norm()) < 0.8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_as_exact_as_its_dequantized_weight(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(256, 192).to(torch.bfloat16)
    if bits == 4:
        layer = bnb.nn.Linear4bit(256, 192, quant_type="nf4", compute_dtype=torch.bfloat16)
    else:
        layer = bnb.nn.Linear8bitLt(256, 192, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    net = Net(layer.to("cpu"))
    net.layer.bias.data = plain.bias.data
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 8, "alpha": 8}})
    net.layer.lora_B["default"].data = 0.05 * torch.randn(192, 8)
    net.layer.lora_magnitude_vector["default"].data = 1.003 * net.layer.fresh_norm("default")
    x = torch.randn(300, 256, dtype=torch.bfloat16)
    expected, leaves = reference(plain, net.layer, x)
    out, dy = net(x), torch.randn(300, 192, dtype=torch.bfloat16)
    own = torch.autograd.grad(out, list(net.layer.adapter_tensors("default").values()), dy)
    eps = torch.finfo(torch.bfloat16).eps
    assert float((out.detach().double() - expected.detach()).norm() / expected.detach().norm()) < 0.7 * eps
    exact = torch.autograd.grad(expected, leaves, dy.double())
    for gradient, wanted, limit in zip(own, exact, (FLOOR, FLOOR, eps), strict=True):
        assert float((gradient.double() - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_rounds_once(kind, dtype):
    base, _ = build(kind, dtype)
    net = with_gain(base, 1.003, low_rank=True)
    a, b, m = (
        t.detach().double().flatten(1) for t in map(torch.atleast_2d, net.layer.adapter_tensors("default").values())
    )
    v = net.layer.matrix().double() + b @ a
    exact = net.layer.from_matrix(m.flatten()[:, None] * v / v.norm(dim=1, keepdim=True))
    merged = mmdora.merge_adapters(net).layer.weight
    assert merged.dtype == dtype
    assert (merged == exact.to(dtype)).double().mean() > 0.999


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_expert_weights_are_rounded_once(transposed, dtype):
    torch.manual_seed(0)
    weight = torch.randn(4, 48, 40).to(dtype)
    weight = weight.mT.contiguous().mT if transposed else weight
    a, b = torch.randn(4, 3, 40).requires_grad_(), (0.1 * torch.randn(4, 48, 3)).requires_grad_()
    norm = (weight.double() + 2 * b.double() @ a.double()).norm(dim=-1).detach()
    m = (1.003 * norm).float().requires_grad_()
    merged = MergedWeightFunction.apply(weight, a, b, m, norm.float(), 2.0)
    leaves = [t.detach().double().requires_grad_() for t in (a, b, m)]
    exact = (leaves[2] / norm)[..., None] * (weight.double() + 2 * leaves[1] @ leaves[0])
    assert (merged == exact.to(dtype)).double().mean() > 0.999
    direction = torch.randn(merged.shape).to(dtype)
    own, wanted = (
        torch.autograd.grad(merged, [a, b, m], direction),
        torch.autograd.grad(exact, leaves, direction.double()),
    )
    for gradient, reference_gradient, limit in zip(own, wanted, (FLOOR, FLOOR, torch.finfo(dtype).eps), strict=True):
        assert float((gradient.double() - reference_gradient).norm() / reference_gradient.norm()) < limit
