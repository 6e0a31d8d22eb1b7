"""Autograd functions that add shBᵀ to a base layer's output u and scale it by g, for embeddings and convolutions.

Like `AdaptedLinearFunction`, they sum in fp32, round once, and save only u and h. h = xAᵀ is computed by the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdora.adapters.ops.autograd import kernels_for, magnitude_gradient, parameter_gradients
from mmdora.adapters.ops.functional import dora_gain, working_dtype


class AdaptedRowsFunction(torch.autograd.Function):
    """y = g ⊙ (u + shBᵀ) for u [..., out] and h [..., r], with gradients for u, h, B and m."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        h: Tensor | None,
        b: Tensor | None,
        magnitude: Tensor | None,
        norm: Tensor | None,
        scale: float,
    ) -> Tensor:
        kernels = kernels_for(u.device)
        gain = None if magnitude is None or norm is None else dora_gain(magnitude, norm)
        rows, working = u.reshape(-1, u.shape[-1]), kernels.working_dtype(u.dtype)
        scaled_b = None if b is None else (scale * b).to(working)
        flat_h = None if h is None else h.reshape(-1, h.shape[-1]).to(working)
        y = kernels.epilogue(rows, flat_h, scaled_b, gain, None, True)
        ctx.save_for_backward(None if gain is None else rows, flat_h, b, gain, norm)
        ctx.scale, ctx.shapes = scale, (u.shape, None if h is None else h.shape)
        return torch.ops.aten._unsafe_view(y, u.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, h, b, gain, norm = ctx.saved_tensors
        kernels, dy = kernels_for(dy.device), dy.reshape(-1, dy.shape[-1])
        scaled_b = None if b is None else (ctx.scale * b).to(h.dtype)
        du, dh, du_sum = kernels.gradients(dy, u, gain, None, scaled_b, ctx.needs_input_grad[0])
        db, dm = parameter_gradients(dy, h, scaled_b, ctx.scale, gain, norm, du_sum, True)
        return (
            du.view(ctx.shapes[0]) if ctx.needs_input_grad[0] else None,
            None if dh is None else dh.view(ctx.shapes[1]),
            None if db is None else db.to(b.dtype),
            dm,
            None,
            None,
        )


class AdaptedChannelsFunction(torch.autograd.Function):
    """y = g ⊙ (u − b + sBh) + b for u [batch, out, ...], which includes b, with gradients for u, h, B and m.

    h is [batch, groups · r, ...], and B [out, r] reads the r channels of the output channel's group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        h: Tensor | None,
        b: Tensor | None,
        magnitude: Tensor | None,
        norm: Tensor | None,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        working = working_dtype(u.dtype)
        gain = None if magnitude is None or norm is None else dora_gain(magnitude, norm)
        y = u.to(working, copy=True)
        if h is not None and b is not None:
            h, grouped = _grouped(h.to(working), b)
            y += (grouped @ h).reshape(u.shape).mul_(scale)
        if gain is not None:
            y *= _like(gain, u).to(working)
            y = y if bias is None else y.add_(_like((1 - gain) * bias, u))
        ctx.save_for_backward(None if gain is None else u, h, b, gain, norm, bias)
        ctx.scale = scale
        return y.to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, h, b, gain, norm, bias = ctx.saved_tensors
        shape, dtype = dy.shape, dy.dtype
        dh = db = dm = du_sum = None
        dy = dy.to(working_dtype(dtype))
        if gain is not None:
            base = u.to(dy.dtype) if bias is None else u - _like(bias, u).to(dy.dtype)
            du_sum = (dy * base).transpose(0, 1).flatten(1).sum(1)
        du = dy if gain is None else dy * _like(gain, dy)
        if b is not None:
            groups, rank = h.shape[1], b.shape[1]
            product = dy.reshape(shape[0], groups, -1, h.shape[-1]) @ h.mT
            product = product.sum(0).view(-1, rank)  # dyᵀh [out, r]
            if du_sum is not None:
                du_sum = du_sum + ctx.scale * (product * b.flatten(1)).sum(1)
            db = product * (ctx.scale if gain is None else ctx.scale * gain[:, None])
            db = db.view(b.shape).to(b.dtype)
            dh = ctx.scale * (b.view(groups, -1, rank).mT.to(dy.dtype) @ du.reshape(shape[0], groups, -1, h.shape[-1]))
            dh = dh.view(shape[0], groups * rank, *shape[2:])
        if du_sum is not None:
            dm = magnitude_gradient(du_sum, norm)
        return du.to(dtype) if ctx.needs_input_grad[0] else None, dh, db, dm, None, None, None


def _grouped(h: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return h as [batch, groups, r, positions] and B as [groups, out / groups, r]."""
    rank = b.shape[1]
    groups = h.shape[1] // rank
    return h.reshape(h.shape[0], groups, rank, -1), b.view(groups, -1, rank).to(h.dtype)


def _like(channels: Tensor, u: Tensor) -> Tensor:
    """Return a value of each channel in a shape that broadcasts to u [batch, channels, ...]."""
    return channels.view(-1, *[1] * (u.dim() - 2))
