"""The Triton kernels, in Triton's interpreter if there is no GPU, and compiled for GPUs without having one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import mmdora
from mmdora.adapters.ops import autograd, torch_kernels

kernels = pytest.importorskip("mmdora.adapters.ops.triton_kernels", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes wrong dot products in bf16; a GPU does not.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(a, b, dtype):
    torch.testing.assert_close(a.double(), b, atol=TOLERANCE[dtype] * b.abs().max().item(), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 100, 4), (64, 64, 16), (5, 130, 150)])
@pytest.mark.parametrize("has", ["low rank", "gain", "both", "both and bias"])
def test_epilogue(shape, dtype, has):
    rows, columns, rank = shape
    torch.manual_seed(0)
    u, h, b = (torch.randn(s, dtype=dtype, device=DEVICE) for s in ((rows, columns), (rows, rank), (columns, rank)))
    gain = torch.rand(columns, device=DEVICE) + 0.5
    bias = torch.randn(columns, dtype=dtype, device=DEVICE) if "bias" in has else None
    h, b = (None, None) if has == "gain" else (h, b)
    gain = None if has == "low rank" else gain
    inner = u.double() + (0 if h is None else h.double() @ b.double().T)
    expected = inner * (1 if gain is None else gain.double()) + (0 if bias is None else bias.double())
    for keep in (False, True):
        work = u.clone()
        y = kernels.epilogue(work, h, b, gain, bias, keep)
        close(y, expected, dtype)
        assert (y.data_ptr() == work.data_ptr()) == (not keep)
        if keep:
            assert torch.equal(work, u)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 100, 4), (64, 64, 16), (5, 130, 150)])
@pytest.mark.parametrize("has", ["low rank", "gain", "both"])
@pytest.mark.parametrize("scaled", [True, False])
def test_gradients(shape, dtype, has, scaled):
    rows, columns, rank = shape
    torch.manual_seed(0)
    dy, u, b = (torch.randn(s, dtype=dtype, device=DEVICE) for s in ((rows, columns), (rows, columns), (columns, rank)))
    gain = None if has == "low rank" else torch.rand(columns, device=DEVICE) + 0.5
    b = None if has == "gain" else b
    bias = torch.randn(columns, dtype=dtype, device=DEVICE) if has == "both" else None
    du, dh, dm = kernels.gradients(dy, u if gain is not None else None, gain, bias, b, scaled)
    expected = dy.double() * (1 if gain is None else gain.double())
    close(du, expected if scaled else dy.double(), dtype)
    if gain is not None:
        close(dm, (dy.double() * (u.double() - (0 if bias is None else bias.double()))).sum(0), torch.float32)
    if b is not None:
        close(dh, expected @ b.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 100, 4), (64, 64, 16), (5, 130, 150)])
@pytest.mark.parametrize("transposed", [True, False])
def test_merge_and_norm(shape, dtype, transposed):
    height, width, rank = shape
    torch.manual_seed(0)
    weight = torch.randn((width, height) if transposed else (height, width), dtype=dtype, device=DEVICE)
    weight = weight.T if transposed else weight
    a, b = (torch.randn(s, dtype=dtype, device=DEVICE) for s in ((rank, width), (height, rank)))
    gain = torch.rand(height, device=DEVICE) + 0.5
    expected = weight.double() + b.double() @ a.double()
    close(kernels.merge(weight, a, b, None), expected, dtype)
    close(kernels.merge(weight, a, b, gain), gain.double()[:, None] * expected, dtype)
    expected = weight.double() + 0.3 * b.double() @ a.double()
    close(kernels.norm(weight, a.float(), b.float(), 0.3), expected.norm(dim=1), torch.float32)


BUILDS = [(capability, dtype, rank) for capability in (80, 90) for dtype in ("bf16", "fp32") for rank in (16, 128)]
QUICK = [(80, "fp32", 16), (90, "bf16", 128)]


@pytest.mark.parametrize(
    ("capability", "dtype", "rank"),
    [pytest.param(*b, marks=[] if b in QUICK else pytest.mark.slow) for b in BUILDS],
)
def test_the_kernels_compile_for_gpus(capability, dtype, rank):
    """To machine code, without a GPU, within the shared memory that the GPU has."""
    code = f"""
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmdora.adapters.ops import triton_kernels as kernels
blocks = dict(ROWS=kernels.ROWS, COLUMNS=kernels.COLUMNS, RANKS={rank}, HAS_LOW_RANK=True, HAS_GAIN=True)
pointers = {{
    kernels._epilogue: ("u", "h", "b", "bias", "y"),
    kernels._gradients: ("dy", "u", "bias", "b", "du", "dh"),
    kernels._merge: ("weight", "a", "b", "out"),
}}
extra = {{
    kernels._epilogue: dict(HAS_BIAS=True),
    kernels._gradients: dict(HAS_BIAS=True, SCALED=True),
    kernels._merge: dict(HAS_OUT=True, HAS_NORM=True, ROWS=kernels.WEIGHT_ROWS, RANKS=min({rank}, 64)),
}}
integers = ("rows", "columns", "height", "width", "rank", "stride", "row_stride", "column_stride")
for kernel, names in pointers.items():
    constants = {{k: v for k, v in (blocks | extra[kernel]).items() if k in kernel.arg_names}}
    known = dict.fromkeys(names, "*{dtype}") | dict.fromkeys(integers, "i32") | dict(gain="*fp32", scale="fp32")
    known |= dict(dm="*fp32", norm="*fp32") | dict.fromkeys(constants, "constexpr")
    types = {{name: known[name] for name in kernel.arg_names}}
    built = compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", {capability}, 32))
    assert len(built.asm["cubin"]) > 1000
    assert built.metadata.shared < {{80: 163, 90: 227}}[{capability}] * 1024, built.metadata.shared
    print(kernel.__name__, built.metadata.shared)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora", "magnitude"])
def test_a_layer_computes_the_same_with_the_kernels(method, bias, dense, monkeypatch):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(40, 70, bias=bias)).to(DEVICE)
    mmdora.inject_adapters(net, {"": {"method": method} | ({} if method == "magnitude" else {"rank": 5})})
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(3, 30, 40, device=DEVICE, requires_grad=True)
    results = []
    for module in (torch_kernels, kernels):
        monkeypatch.setattr(autograd, "kernels_for", lambda device, module=module: module)
        net.zero_grad()
        x.grad = None
        out = net(x)
        (out.square().sum() if dense else out.sum()).backward()  # a sum's gradient is one number, expanded
        results.append([out.detach(), x.grad] + [p.grad for p in net.parameters() if p.requires_grad])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
