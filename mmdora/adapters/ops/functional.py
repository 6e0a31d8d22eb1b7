"""The mathematics of LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353), as pure functions on tensors.

DoRA's weight is W' = m ⊙ (W + sBA) / ‖W + sBA‖, where the norm is taken over each row of torch's [out, in] weight. The
norm n is a constant in the backward pass (§4.3 of the DoRA paper). The bias is not scaled:
y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + b, with the gain g = m / n.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# Rows that are processed at once where a copy in another dtype is needed: few on a CPU, so that the copy stays in its
# cache, and many elsewhere, where every operation has to be launched.
CPU_ROWS = 256
OTHER_ROWS = 8192
# Elements of expert weights that are processed at once; at least those of one expert, and on a CPU no more.
EXPERT_ELEMENTS = 2**26
NORM_COLUMNS = 2048


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of a dtype are computed with: fp32 for half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def row_slices(x: Tensor) -> Iterator[slice]:
    """Yield slices of the first dimension of x [rows, width] that are processed one after the other."""
    if torch.compiler.is_compiling():
        yield slice(None)  # the compiler fuses what reads and writes these rows
        return
    rows = CPU_ROWS if x.device.type in ("cpu", "meta") else OTHER_ROWS
    # Without data, the first slice shows all that happens.
    for start in range(0, min(x.shape[0], rows) if x.is_meta else x.shape[0], rows):
        yield slice(start, start + rows)


def expert_slices(weight: Tensor) -> Iterator[slice]:
    """Yield slices of the first dimension of weights [experts, ., .] that are processed one after the other."""
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    experts = 1 if weight.device.type == "cpu" else max(1, EXPERT_ELEMENTS // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], experts):
        yield slice(start, start + experts)


@torch.no_grad()
def dora_norm(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float) -> Tensor:
    """Return the row norms n = ‖W + sBA‖ [..., out] in fp32 (float64 for float64); ‖W‖ if A and B are None.

    W is [..., out, in], A [..., r, in] and B [..., out, r]. The sum is built in fp32 for a part of the weight at a
    time, so that there is neither a copy of the whole weight nor of BA. On a GPU, a Triton kernel does that.
    """
    dtype = working_dtype(weight.dtype)
    if weight.is_meta:
        return weight.new_empty(weight.shape[:-1], dtype=dtype)
    a = b = None
    if lora_a is not None and lora_b is not None:
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        if weight.is_cuda and weight.dim() == 2 and has_triton():
            from mmdora.adapters.ops import triton_kernels

            return triton_kernels.norm(weight, a, b, scale)
        b = scale * b
    if weight.dim() > 2:
        norms = []
        for experts in expert_slices(weight):
            part = weight[experts].to(dtype)
            part = part if a is None or b is None else torch.baddbmm(part, b[experts], a[experts])
            norms.append(_row_norms(part))
        return torch.cat(norms)
    norms = []
    # Memory is read in order: parts of a weight that is stored as [in, out] have all rows and a few columns.
    transposed = weight.stride(0) < weight.stride(1)
    for places in row_slices(weight.T if transposed else weight):
        part = (weight[:, places] if transposed else weight[places]).to(dtype)
        if a is not None and b is not None:
            part = torch.addmm(part, b if transposed else b[places], a[:, places] if transposed else a)
        norms.append(_row_norms(part))
    return torch.linalg.vector_norm(torch.stack(norms), dim=0) if transposed else torch.cat(norms)


def _row_norms(matrix: Tensor) -> Tensor:
    """Return the norms of the rows. On a CPU, one sum over a long row would be exact to a few 1e-6 only."""
    norms = [torch.linalg.vector_norm(part, dim=-1) for part in matrix.split(NORM_COLUMNS, dim=-1)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def dora_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return g = m / n [out] in the norm's dtype, differentiable in m. A row with n = 0 has no direction: g = 1."""
    zero = norm == 0
    return (magnitude.to(norm.dtype) / norm.masked_fill(zero, 1.0)).masked_fill(zero, 1.0)


def merged_weight(
    weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float, magnitude: Tensor | None
) -> Tensor:
    """Return W' [..., out, in]: the weight of a plain layer that computes the same as the adapted one.

    It is in fp32, or in float64 for a weight in float64. Without A and B, only the magnitude applies; without a
    magnitude, the result is LoRA's W + sBA.
    """
    merged = weight.to(working_dtype(weight.dtype))
    if lora_a is not None and lora_b is not None:
        merged = merged + scale * (lora_b.to(merged.dtype) @ lora_a.to(merged.dtype))
    if magnitude is not None:
        merged = merged * dora_gain(magnitude, dora_norm(weight, lora_a, lora_b, scale))[..., None]
    return merged
