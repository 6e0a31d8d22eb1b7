"""What a layer with an adapter cannot do is one clear error; float64 stays float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mmdora
from mmdora.core.errors import UserError

from .test_layers import LAYERS, Model, Net, adapted, build, mixtral


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d 1x1", "embedding"])
def test_a_layers_own_weight_stays_frozen(kind):
    base, x = build(kind)
    net = adapted(base)
    for attribute in ("weight", "bias") if net.layer.bias is not None else ("weight",):
        tensor = getattr(net.layer, attribute).requires_grad_(True)
        with pytest.raises(UserError, match=f"the {attribute} of layer requires a gradient"):
            net(x)
        with torch.no_grad():
            net(x)
        with mmdora.disable_adapters(net):
            net(x).sum().backward()  # the plain layer trains them
        assert tensor.grad is not None
        tensor.requires_grad_(False)
    net(x).sum().backward()


def test_weights_of_siblings_and_experts_stay_frozen():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x)

    net = Siblings()
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 2}})
    net.k_proj.bias.requires_grad_(True)
    with pytest.raises(UserError, match="the bias of k_proj requires a gradient"):
        net(torch.randn(3, 6))
    block, inputs = mixtral()
    experts = Model(block)
    mmdora.inject_adapters(experts, {"": {"method": "dora", "rank": 2, "targets": ["gate_up_proj"]}})
    block.gate_up_proj.requires_grad_(True)
    with pytest.raises(UserError, match=r"the weight of \S*gate_up_proj requires a gradient"):
        experts(*inputs)
    block.gate_up_proj.requires_grad_(False)
    with pytest.raises(UserError, match="DataParallel does not work with adapters on expert weights"):
        block.gate_up_proj_adapter._replicate_for_data_parallel()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "reparametrize",
    [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.weight_norm],
)
def test_a_weight_that_is_computed_from_others_is_refused(reparametrize):
    net = Net(reparametrize(nn.Linear(6, 4)))
    with pytest.raises(UserError, match=r"layer is a \w*Linear, .*: its weight is computed from other parameters"):
        mmdora.inject_adapters(net, {"": {"method": "dora", "targets": ["layer"]}})


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_double_backward_and_functorch_are_torchs_errors(kind):
    base, x = build(kind)
    net, x = adapted(base), x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: net(x).sum())(x.detach())
    parameters = dict(net.named_parameters())
    assert torch.equal(torch.func.functional_call(net, parameters, (x,)), net(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_float64_models_compute_in_float64_also_under_autocast(kind):
    base, x = build(kind)
    net = adapted(base.double()).double()
    x = x.double() if x.is_floating_point() else x
    expected = net(x)
    assert expected.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    assert torch.equal(out, expected)
    merged = mmdora.merge_adapters(net)
    torch.testing.assert_close(merged(x), expected, atol=1e-12, rtol=1e-12)
