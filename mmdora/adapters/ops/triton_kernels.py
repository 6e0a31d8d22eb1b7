"""Triton kernels for the steps of `AdaptedLinearFunction` between the large matrix products.

Each kernel reads the activations or the weight once. Products with A and B are limited by memory traffic, not by
arithmetic, so the product with B is fused into the pass that scales the output and, in the backward pass, into the one
that scales the output's gradient. Sums are in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # rows of an activation per program
COLUMNS = 64
RANKS = 128  # at most this many columns of B at once
WEIGHT_ROWS = 32  # rows of a weight per program; few, since a program reads whole rows


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of A, B and h beside activations of a dtype: the same. The kernels' sums are in fp32."""
    return dtype


@triton.jit
def _epilogue(
    u, h, b, gain, bias, y, rows, columns, rank, stride,
    HAS_LOW_RANK: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    total = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_LOW_RANK:
        for start in range(0, rank, RANKS):
            k = start + tl.arange(0, RANKS)
            left = tl.load(
                h + row[:, None] * stride + k[None, :], mask=(row < rows)[:, None] & (k < rank)[None, :], other=0.0
            )
            right = tl.load(
                b + column[None, :] * rank + k[:, None],
                mask=(column < columns)[None, :] & (k < rank)[:, None],
                other=0.0,
            )
            total += tl.dot(left, right, input_precision="ieee")
    if HAS_GAIN:
        total *= tl.load(gain + column, mask=column < columns, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


def epilogue(
    u: Tensor, h: Tensor | None, b: Tensor | None, gain: Tensor | None, bias: Tensor | None, keep: bool
) -> Tensor:
    """Return y = g ⊙ (u + hBᵀ) + b for u [rows, out], h [rows, r], B [out, r], g [out] in fp32 and b [out].

    With `keep`, y is a new tensor and u stays as it is; otherwise y is u. h may be a slice of wider rows.
    """
    rows, columns = u.shape
    y = torch.empty_like(u) if keep else u
    rank = 0 if h is None else h.shape[1]
    block = max(16, min(RANKS, triton.next_power_of_2(rank)))
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    _epilogue[grid](
        u, u if h is None else h, u if b is None else b, u if gain is None else gain, u if bias is None else bias, y,
        rows, columns, rank, 0 if h is None else h.stride(0),
        HAS_LOW_RANK=h is not None, HAS_GAIN=gain is not None, HAS_BIAS=bias is not None,
        ROWS=ROWS, COLUMNS=COLUMNS, RANKS=block,
    )  # fmt: skip
    return y


@triton.jit
def _gradients(
    dy, u, gain, bias, b, du, dh, dm, rows, columns, rank,
    HAS_LOW_RANK: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        place = row[:, None] * columns + column[None, :]
        gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_GAIN:
            out = tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                out -= tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
            partial = tl.sum(gradient * out, axis=0)
            gradient *= tl.load(gain + column, mask=column < columns, other=0.0)[None, :]
            if tl.program_id(1) == 0:  # all programs of these rows compute this; one stores it
                tl.store(dm + tl.program_id(0).to(tl.int64) * columns + column, partial, mask=column < columns)
                if SCALED:
                    tl.store(du + place, gradient.to(du.dtype.element_ty), mask=inside)
        if HAS_LOW_RANK:
            right = tl.load(
                b + column[:, None] * rank + k[None, :],
                mask=(column < columns)[:, None] & (k < rank)[None, :],
                other=0.0,
            )
            total += tl.dot(gradient.to(right.dtype), right, input_precision="ieee")
    if HAS_LOW_RANK:
        place = row[:, None] * rank + k[None, :]
        tl.store(dh + place, total.to(dh.dtype.element_ty), mask=(row < rows)[:, None] & (k < rank)[None, :])


def gradients(
    dy: Tensor, u: Tensor | None, gain: Tensor | None, bias: Tensor | None, b: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return du = dy ⊙ g, dh = (dy ⊙ g) B and the sum of dy ⊙ (u − b) over the rows.

    dy and u are [rows, out], g in fp32 and the bias b [out], and B [out, r]. Without a gain, or if `scaled` is false,
    du is dy itself. The sum is None without a gain, and dh is None without B.
    """
    dy = dy.contiguous()  # autograd may pass an expanded gradient
    rows, columns = dy.shape
    rank = 0 if b is None else b.shape[1]
    block = max(16, min(RANKS, triton.next_power_of_2(rank)))
    blocks = triton.cdiv(rows, ROWS)
    du = dy if gain is None or not scaled else torch.empty_like(dy)
    dh = None if b is None else dy.new_empty(rows, rank)
    dm = None if gain is None else dy.new_empty(blocks, columns, dtype=torch.float32)
    _gradients[(blocks, max(1, triton.cdiv(rank, block)))](
        dy, dy if u is None else u, dy if gain is None else gain, dy if bias is None else bias, dy if b is None else b,
        du, dy if dh is None else dh, dy if dm is None else dm, rows, columns, rank,
        HAS_LOW_RANK=b is not None, HAS_GAIN=gain is not None, HAS_BIAS=bias is not None, SCALED=scaled,
        ROWS=ROWS, COLUMNS=COLUMNS, RANKS=block,
    )  # fmt: skip
    return du, dh, None if dm is None else dm.sum(0)


@triton.jit
def _merge(
    weight, a, b, gain, out, norm, height, width, rank, scale, row_stride, column_stride,
    HAS_GAIN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < height)[:, None] & (column < width)[None, :]
        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, rank, RANKS):
            k = first + tl.arange(0, RANKS)
            left = tl.load(
                b + row[:, None] * rank + k[None, :], mask=(row < height)[:, None] & (k < rank)[None, :], other=0.0
            )
            right = tl.load(
                a + k[:, None] * width + column[None, :],
                mask=(k < rank)[:, None] & (column < width)[None, :],
                other=0.0,
            )
            product += tl.dot(left, right, input_precision="tf32x3")
        place = row[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride
        total = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) + scale * product
        if HAS_NORM:
            squares += tl.sum(total * total, axis=1)
        if HAS_GAIN:
            total *= tl.load(gain + row, mask=row < height, other=0.0)[:, None]
        if HAS_OUT:
            tl.store(out + row[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=inside)
    if HAS_NORM:
        tl.store(norm + row, tl.sqrt(squares), mask=row < height)


def merge(weight: Tensor, a: Tensor, b: Tensor, gain: Tensor | None) -> Tensor:
    """Return g ⊙ (W + BA) [out, in], for W, A [r, in] and B [out, r] of one dtype and g [out] in fp32."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _over_weights(weight, a, b, 1.0, gain, out, None)
    return out


def norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ‖W + sBA‖ [out] of the rows of W [out, in], for A [r, in] and B [out, r]; sums in fp32, stores no BA."""
    norms = weight.new_empty(weight.shape[0], dtype=torch.float32)
    _over_weights(weight, a, b, scale, None, None, norms)
    return norms


def _over_weights(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, gain: Tensor | None, out: Tensor | None, norms: Tensor | None
) -> None:
    (height, width), rank = weight.shape, a.shape[0]
    a, b = a.contiguous(), b.contiguous()
    _merge[(triton.cdiv(height, WEIGHT_ROWS),)](
        weight, a, b, weight if gain is None else gain, weight if out is None else out,
        weight if norms is None else norms, height, width, rank, scale, weight.stride(0), weight.stride(1),
        HAS_GAIN=gain is not None, HAS_OUT=out is not None, HAS_NORM=norms is not None,
        ROWS=WEIGHT_ROWS, COLUMNS=COLUMNS, RANKS=max(16, min(64, triton.next_power_of_2(rank))),
    )  # fmt: skip
