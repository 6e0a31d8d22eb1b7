"""The steps of the autograd functions between the large matrix products, in PyTorch, for devices without Triton.

Half-precision activations and weights are processed in fp32, a few rows at a time, and every result is rounded once.
The product with a gain in half precision would lose deviations from 1 below 0.4% (bf16). Products with A and B are
computed in fp32 too: they are small, and most CPUs compute them faster than in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmdora.adapters.ops.functional import row_slices, working_dtype

__all__ = [
    "add_product",
    "epilogue",
    "gradients",
    "merge",
    "product",
    "times_transposed",
    "transposed_times",
    "working_dtype",
]


def epilogue(
    u: Tensor, h: Tensor | None, b: Tensor | None, gain: Tensor | None, bias: Tensor | None, keep: bool
) -> Tensor:
    """Return y = g ⊙ (u + hBᵀ) + b for u [rows, out], h [rows, r], B [out, r], g [out] in fp32 and b [out].

    h and B are in the working dtype of u. With `keep`, y is a new tensor and u stays as it is; otherwise y is u.
    """
    dtype = working_dtype(u.dtype)
    gain, bias = (None if t is None else t.to(dtype) for t in (gain, bias))
    y = torch.empty_like(u) if keep else u
    if h is None and gain is not None and u.dtype == dtype:
        return torch.mul(u, gain, out=y) if bias is None else torch.addcmul(bias, u, gain, out=y)
    for rows, part in _parts(u, dtype, y):
        if h is not None and b is not None:
            part.addmm_(h[rows], b.T)
        if gain is not None:
            part.mul_(gain)
        if bias is not None:
            part.add_(bias)
        if part.dtype != y.dtype:
            y[rows] = part
    return y


def gradients(
    dy: Tensor, u: Tensor | None, gain: Tensor | None, bias: Tensor | None, b: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return du = dy ⊙ g, dh = (dy ⊙ g) B and the sum of dy ⊙ (u − b) over the rows.

    dy and u are [rows, out], g and the bias b [out], and B [out, r]. B and dh are in the working dtype of dy, and the
    sum is in fp32. Without a gain, or if `scaled` is false, du is dy itself. The sum is None without a gain, and dh is
    None without B.
    """
    if gain is None or u is None:
        return dy, None if b is None else times_transposed(dy, b.T), None
    dtype = working_dtype(dy.dtype)
    du = torch.empty_like(dy, memory_format=torch.contiguous_format) if scaled else dy
    dh = None if b is None else dy.new_empty(dy.shape[0], b.shape[1], dtype=dtype)
    dm, scale = gain.new_zeros(gain.shape, dtype=dtype), gain.to(dtype)
    if b is not None and not scaled:
        b = scale[:, None] * b
    for rows, part in _parts(dy, dtype, du):
        # A product with ones is nine times as fast as `sum` on a CPU.
        products = u[rows].to(dtype, copy=True)
        products = (products if bias is None else products.sub_(bias)).mul_(part)
        dm += (products.new_ones(1, products.shape[0]) @ products)[0]
        part = part.mul_(scale) if scaled else part
        if dh is not None:
            dh[rows] = part @ b  # type: ignore[operator]
        if scaled and part.dtype != du.dtype:
            du[rows] = part
    return du, dh, dm.to(gain.dtype)


def merge(weight: Tensor, a: Tensor, b: Tensor, gain: Tensor | None) -> Tensor:
    """Return g ⊙ (W + BA) [out, in] in the dtype of W, for A [r, in] and B [out, r] in its working dtype."""
    if weight.dtype == a.dtype:
        merged = torch.addmm(weight, b, a)
        return merged if gain is None else merged.mul_(gain[:, None].to(a.dtype))
    merged = torch.empty_like(weight)
    for rows in row_slices(weight):
        total = torch.addmm(weight[rows].to(a.dtype), b[rows], a)
        merged[rows] = total if gain is None else total.mul_(gain[rows, None].to(a.dtype))
    return merged


def times_transposed(x: Tensor, a: Tensor) -> Tensor:
    """Return xAᵀ [rows, r] in the dtype of A, for x [rows, in] and A [r, in]."""
    if x.dtype == a.dtype:
        return x @ a.T
    h = x.new_empty(x.shape[0], a.shape[0], dtype=a.dtype)
    for rows, part in _parts(x, a.dtype):
        h[rows] = part @ a.T
    return h


def product(h: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return hA [rows, in] in a dtype, for h [rows, r] and A [r, in] in its working dtype."""
    if h.dtype == dtype:
        return h @ a
    out = h.new_zeros(h.shape[0], a.shape[1], dtype=dtype)
    add_product(out, h, a)
    return out


def transposed_times(x: Tensor, h: Tensor) -> Tensor:
    """Return xᵀh [in, r] in the dtype of h, for x [rows, in] and h [rows, r]."""
    if x.dtype == h.dtype:
        return x.T @ h
    product = h.new_zeros(x.shape[1], h.shape[1])
    for rows, part in _parts(x, h.dtype):
        product.addmm_(part.T, h[rows])
    return product


def add_product(x: Tensor, h: Tensor, a: Tensor) -> None:
    """Add hA to x [rows, in] in place, for h [rows, r] and A [r, in] of one dtype."""
    if x.dtype == a.dtype:
        x.addmm_(h, a)
        return
    for rows, part in _parts(x, a.dtype):
        x[rows] = part.addmm_(h[rows], a)


def _parts(x: Tensor, dtype: torch.dtype, target: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield copies of a few rows of x [rows, width] at a time in `dtype`, with their places.

    The copies lie in `target` if that has the dtype (x itself needs no copy), and otherwise in a buffer, which is small
    enough to stay in the CPU's cache and is used again for the next rows.
    """
    buffer: Tensor | None = None
    for rows in row_slices(x):
        source = x[rows]
        if target is not None and target.dtype == dtype:
            part = target[rows]
        else:
            buffer = source.new_empty(source.shape, dtype=dtype) if buffer is None else buffer
            part = buffer[: source.shape[0]]
        yield rows, part if target is x and part.dtype == x.dtype else part.copy_(source)
