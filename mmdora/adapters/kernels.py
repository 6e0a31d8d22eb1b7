"""Triton kernels for what `AdaptedLinearFunction` does beside matrix products, one pass over the activations each.

Products with A and B are skinny: they cost memory traffic, not arithmetic. So the one with B rides on the pass that
scales the output, and the one with B again on the pass that scales the output's gradient. Sums are in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # of an activation, a program
COLUMNS = 64
RANKS = 128  # at most so many columns of B at once


@triton.jit
def _epilogue(
    u, h, b, gain, bias, y, rows, columns, rank,
    HAS_LOW_RANK: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr,
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
                h + row[:, None] * rank + k[None, :], mask=(row < rows)[:, None] & (k < rank)[None, :], other=0.0
            )
            right = tl.load(
                b + column[None, :] * rank + k[:, None],
                mask=(column < columns)[None, :] & (k < rank)[:, None],
                other=0.0,
            )
            total += tl.dot(left, right, input_precision="ieee")
    if KEEP:
        tl.store(u + place, total.to(u.dtype.element_ty), mask=inside)
    if HAS_GAIN:
        total *= tl.load(gain + column, mask=column < columns, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


def epilogue(
    u: Tensor, h: Tensor | None, b: Tensor | None, gain: Tensor | None, bias: Tensor | None, keep: bool
) -> Tensor:
    """y = g ⊙ (u + hBᵀ) + b for u [rows, out], h [rows, r], B [out, r], g [out] in fp32 and b [out].

    Writes over u: y itself, or with `keep` the sum u + hBᵀ, beside a new y.
    """
    rows, columns = u.shape
    y = torch.empty_like(u) if keep else u
    rank = 0 if h is None else h.shape[1]
    some = max(16, min(RANKS, triton.next_power_of_2(rank)))
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    _epilogue[grid](
        u, u if h is None else h, u if b is None else b, u if gain is None else gain, u if bias is None else bias, y,
        rows, columns, rank,
        HAS_LOW_RANK=h is not None, HAS_GAIN=gain is not None, HAS_BIAS=bias is not None, KEEP=keep,
        ROWS=ROWS, COLUMNS=COLUMNS, RANKS=some,
    )  # fmt: skip
    return y


@triton.jit
def _gradients(
    dy, u, gain, b, du, dh, dm, rows, columns, rank,
    HAS_LOW_RANK: tl.constexpr, HAS_GAIN: tl.constexpr,
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
            partial = tl.sum(gradient * out, axis=0)
            gradient *= tl.load(gain + column, mask=column < columns, other=0.0)[None, :]
            if tl.program_id(1) == 0:  # programs that share these rows all compute this; one writes it
                tl.store(dm + tl.program_id(0).to(tl.int64) * columns + column, partial, mask=column < columns)
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
    dy: Tensor, u: Tensor | None, gain: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """du = dy ⊙ g, dh = du B and Σ dy ⊙ u over the rows, for dy and u [rows, out], g [out] in fp32, B [out, r].

    Without a gain du is dy itself and there is no sum; without B there is no dh.
    """
    dy = dy.contiguous()  # autograd may hand on an expanded gradient
    rows, columns = dy.shape
    rank = 0 if b is None else b.shape[1]
    some = max(16, min(RANKS, triton.next_power_of_2(rank)))
    blocks = triton.cdiv(rows, ROWS)
    du = dy if gain is None else torch.empty_like(dy)
    dh = None if b is None else dy.new_empty(rows, rank)
    dm = None if gain is None else dy.new_empty(blocks, columns, dtype=torch.float32)
    _gradients[(blocks, max(1, triton.cdiv(rank, some)))](
        dy, dy if u is None else u, dy if gain is None else gain, dy if b is None else b,
        du, dy if dh is None else dh, dy if dm is None else dm, rows, columns, rank,
        HAS_LOW_RANK=b is not None, HAS_GAIN=gain is not None, ROWS=ROWS, COLUMNS=COLUMNS, RANKS=some,
    )  # fmt: skip
    return du, dh, None if dm is None else dm.sum(0)
