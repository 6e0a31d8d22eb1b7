"""DoRA's norms are never stale: computed in each forward pass, and cached only inside `weights_fixed`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mmdora
from mmdora.adapters.ops import norm_cache as norms
from mmdora.adapters.ops.functional import dora_norm
from tests.processes import python

DORA = {"method": "dora", "rank": 4, "alpha": 8}


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 6))
    mmdora.inject_adapters(net, {"": DORA})
    return net


@contextmanager
def counted_norms() -> Iterator[list[int]]:
    """Append the number of vector norms that were computed inside the block."""
    counts: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield counts
    counts += [event.count for event in profile.key_averages() if event.key == "aten::linalg_vector_norm"]


def expected(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The network's output in float64, from the current values of its tensors."""
    for layer in (net[0], net[2]):
        a, b, m = (t[layer.active].double() for t in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
        v = layer.weight.double() + layer.specs[layer.active].scale * b @ a
        x = F.linear(x.double(), m[:, None] * v / v.norm(dim=1, keepdim=True), layer.bias.double())
        x = F.gelu(x) if layer is net[0] else x
    return x


def by_optimizer(**options):
    def change(net: nn.Sequential) -> None:
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, **options)
        net(torch.randn(5, 12)).square().sum().backward()
        optimizer.step()

    return change


def by_state_dict(net: nn.Sequential) -> None:
    net.load_state_dict({k: v + 0.1 for k, v in net.state_dict().items()})


def by_data(net: nn.Sequential) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)


def by_average(net: nn.Sequential) -> None:
    other = copy.deepcopy(net)
    by_data(other)
    with torch.no_grad():
        for parameter, target in zip(net.parameters(), other.parameters(), strict=True):
            parameter.lerp_(target, 0.5)


def by_swap(net: nn.Sequential) -> None:
    mmdora.inject_adapters(net, {"": DORA | {"rank": 2}}, name="other")
    by_data(net)
    mmdora.set_adapter(net, "default")
    net(torch.randn(2, 12))
    mmdora.set_adapter(net, "other")


CHANGES = {
    "for-each optimizer": by_optimizer(foreach=True),
    "fused optimizer": by_optimizer(fused=True),
    "load_state_dict": by_state_dict,
    ".data": by_data,
    "moving average": by_average,
    "swap": by_swap,
}


@pytest.mark.parametrize("way", CHANGES)
def test_a_change_of_weights_changes_the_norm(net, way):
    x = torch.randn(7, 12)
    for _ in range(2):
        net(x)
        CHANGES[way](net) if way != "swap" or len(net[0].specs) == 1 else by_data(net)
        torch.testing.assert_close(net(x).double(), expected(net, x), atol=1e-5, rtol=1e-5)


def test_a_scope_computes_each_norm_once(net):
    x = torch.randn(7, 12, requires_grad=True)
    with counted_norms() as counts, norms.weights_fixed():
        first = net(x)
        checkpoint(net, x, use_reentrant=False).sum().backward()  # runs forward twice
        second = net(x)
    assert counts == [2]  # one for each layer
    assert torch.equal(first, second)
    by_data(net)
    torch.testing.assert_close(net(x).double(), expected(net, x), atol=1e-5, rtol=1e-5)
    with norms.weights_fixed():  # nothing is left of the first scope
        torch.testing.assert_close(net(x).double(), expected(net, x), atol=1e-5, rtol=1e-5)


def test_a_scope_keeps_adapters_apart(net):
    mmdora.inject_adapters(net, {"": DORA}, name="other")
    by_data(net)
    x = torch.randn(7, 12)
    with norms.weights_fixed():
        for name in ("default", "other", "default"):
            mmdora.set_adapter(net, name)
            torch.testing.assert_close(net(x).double(), expected(net, x), atol=1e-5, rtol=1e-5)


def test_a_scope_keeps_copies_apart(net):
    other = copy.deepcopy(net)
    by_data(other)
    x = torch.randn(7, 12)
    with norms.weights_fixed():
        for model in (net, other):
            torch.testing.assert_close(model(x).double(), expected(model, x), atol=1e-5, rtol=1e-5)


def test_an_error_ends_the_scope(net):
    with pytest.raises(RuntimeError), norms.weights_fixed():
        net(torch.randn(3, 11))
    x = torch.randn(3, 12)
    net(x)
    by_data(net)
    torch.testing.assert_close(net(x).double(), expected(net, x), atol=1e-5, rtol=1e-5)


def test_compiled_is_the_same_without_a_graph_break(net):
    by_data(net)
    x = torch.randn(7, 12)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    gradients = []
    for model in (net, compiled):
        net.zero_grad()
        out = model(x)
        out.square().sum().backward()
        gradients.append([out.detach()] + [p.grad.clone() for p in net.parameters() if p.requires_grad])
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(192, 256), (300, 5000), (6, 20000), (3, 20, 40)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_norms_of_half_precision_weights_are_exact(transposed, shape, dtype):
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(shape)).to(dtype)
    weight = weight.mT.contiguous().mT if transposed else weight
    a, b = torch.randn(*shape[:-2], 8, shape[-1]), 0.01 * torch.randn(*shape[:-1], 8)
    for low_rank in (False, True):
        norm = dora_norm(weight, a, b, 0.7) if low_rank else dora_norm(weight, None, None, 0.7)
        exact = (weight.double() + (0.7 * b.double() @ a.double() if low_rank else 0)).norm(dim=-1)
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), exact, atol=0, rtol=1e-6)


@pytest.mark.parametrize("forward", ["exact", "merged"])
def test_the_forward_pass_uses_the_exact_norm(forward):
    """Also where W + sBA is rounded to bf16 for the product."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32)).bfloat16()
    mmdora.inject_adapters(net, {"": DORA | {"forward": forward}})
    net[0].lora_B["default"].data = 0.1 * torch.randn(32, 4)
    with norms.weights_fixed():
        net(torch.randn(9, 64).bfloat16())
        cached = net[0].norm("default")
    exact = (net[0].weight.double() + 2 * net[0].lora_B["default"].double() @ net[0].lora_A["default"].double()).norm(
        dim=1
    )
    torch.testing.assert_close(cached.double(), exact, atol=0, rtol=1e-6)


DEEPSPEED = """
import os
import deepspeed
import torch
from torch import nn
import mmdora
from mmdora.adapters import adapter_layers
from mmdora.adapters.ops import norm_cache as norms
from mmdora.core.deepspeed import gather_in_forward, gathered, prepare_process

prepare_process()

for stage in (0, 1, 2, 3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 6))
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 4, "alpha": 8}})
    layers = [layer for _, layer in adapter_layers(net)]
    for layer in layers:
        gather_in_forward(layer, layer.adapter_tensors("default").values())
    trained = [p for p in net.parameters() if p.requires_grad]
    config = {
        "bf16": {"enabled": True}, "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": 7, "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(trained, lr=0.1), config=config)
    x = torch.randn(7, 12, dtype=torch.bfloat16)
    before = None
    for _ in range(4):
        with norms.weights_fixed():
            engine.backward(engine(x).float().square().mean())
        engine.step()
        out = engine(x)
        with gathered(net.parameters()):
            expected = x.double()
            for layer in layers:
                a, b, m = (t.detach().double() for t in layer.adapter_tensors("default").values())
                v = layer.weight.double() + 2 * b @ a
                expected = expected @ (m[:, None] * v / v.norm(dim=1, keepdim=True)).T + layer.bias.double()
                expected = nn.functional.gelu(expected) if layer is layers[0] else expected
        error = (out.double() - expected).norm() / expected.norm()
        assert error < 0.02, (stage, error)
        # The output changes by more than that in a step, so a norm of the step before would be noticed.
        assert before is None or (expected - before).norm() / before.norm() > 0.05, stage
        before = expected
    print("stage", stage)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")
def test_no_norm_is_stale_with_deepspeeds_bf16_optimizers(tmp_path):
    """They change parameters without increasing `Parameter._version`, at every ZeRO stage."""
    environment = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = python("-c", DEEPSPEED, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("stage")] == [f"stage {i}" for i in range(4)]
