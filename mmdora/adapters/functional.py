"""The mathematics of LoRA and DoRA (arXiv 2106.09685, 2402.09353), as pure functions on tensors.

W' = m ⊙ (W + sBA) / ‖W + sBA‖, with the norm over each row of torch's [out, in] weight. The norm n is a constant in the
backward pass (§4.3 of the DoRA paper), and the bias stands outside: y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + b with g = m / n.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this share of the summands' size, the factored norm has cancelled too far to be exact to 1e-6 (W ≈ −sBA).
CANCELLATION = 0.1
# What a gain of exactly zero is computed as, so that the magnitude's gradient can be taken from the output.
LEAST_GAIN = 1e-20
ROWS = 2048  # of an activation at once, where a pass over it has temporaries


def as_is(weight: Tensor) -> Tensor:
    """A frozen weight that is stored as the matrix [out, in]."""
    return weight


def transposed(weight: Tensor) -> Tensor:
    """A frozen weight that is stored as [in, out]."""
    return weight.T


@torch.no_grad()
def dora_norm(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float) -> Tensor:
    """Row norms ‖W + sBA‖ in fp32 [..., out], without building BA; ‖W‖ where A and B are None.

    Of W [..., out, in], A [..., r, in] and B [..., out, r]: n² = ‖W‖² + 2s·rowsum((WAᵀ) ⊙ B) + s²·rowsum((B(AAᵀ)) ⊙ B).
    Rows where this cancels are computed densely.
    """
    if lora_a is None or lora_b is None:
        return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32)
    a, b = lora_a.float(), lora_b.float()
    w2 = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).square()
    cross = (_times_transposed(weight, a) * b).sum(-1)
    ba2 = ((b @ (a @ a.mT)) * b).sum(-1)
    squared = w2 + 2 * scale * cross + scale**2 * ba2
    cancelled = squared < CANCELLATION * (w2 + scale**2 * ba2)
    if cancelled.any():
        where = cancelled.nonzero(as_tuple=True)
        rows = weight[where].float() + scale * (b[where].unsqueeze(-2) @ a[where[:-1]]).squeeze(-2)
        squared[where] = rows.square().sum(-1)
    return squared.clamp_min(0).sqrt()


def _times_transposed(weight: Tensor, a: Tensor) -> Tensor:
    """W Aᵀ [..., out, r] in fp32. A half-precision W meets A in a high and a low half; no fp32 copy of it is made."""
    if weight.dtype == torch.float32:
        return weight @ a.mT
    high = a.to(weight.dtype)
    low = (a - high.float()).to(weight.dtype)
    return (weight @ torch.cat([high, low], dim=-2).mT).float().unflatten(-1, (2, -1)).sum(-2)


def dora_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / n in fp32, with m's gradient; 1 for a zero row, which has no direction that a magnitude could scale."""
    zero = norm == 0
    return (magnitude.float() / norm.masked_fill(zero, 1.0)).masked_fill(zero, 1.0)


class AdaptedLinearFunction(torch.autograd.Function):
    """y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + b for a frozen W and b, with gradients for x, A, B and m; LoRA is g = 1.

    Saves x, h = xAᵀ and, for dm, the output itself where there is no bias (u = y / g), else the pre-bias u; never the
    two products apart. All matrix products beside the base layer's own two are skinny.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., in]
        dropped: Tensor | None,  # [..., in]: what the low-rank branch reads; None: x
        weight: Tensor,  # frozen; `read` makes it [out, in]
        bias: Tensor | None,  # [out], frozen
        lora_a: Tensor | None,  # [r, in]
        lora_b: Tensor | None,  # [out, r]; None: the magnitude alone
        magnitude: Tensor | None,  # [out]; None: LoRA
        norm: Tensor | None,  # [out], fp32, a constant
        scale: float,
        read: Callable[[Tensor], Tensor] = as_is,
    ) -> Tensor:
        dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1])
        u = rows @ read(weight).to(dtype).T
        h = b = gain = None
        if lora_a is not None and lora_b is not None:
            h = (rows if dropped is None else dropped.reshape(rows.shape)) @ lora_a.to(dtype).T
            b = (scale * lora_b).to(dtype)
        if magnitude is not None:
            assert norm is not None
            gain = dora_gain(magnitude, norm)
            gain.masked_fill_(gain == 0, LEAST_GAIN)
        # fp16's range is too small to find u again from u * g.
        keep = gain is not None and (bias is not None or dtype == torch.float16)
        y = passes(x.device).epilogue(u, h, b, gain, None if bias is None else bias.to(dtype), keep)
        # Not a view for autograd, which would forbid to change the output in place.
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        saved = None if gain is None else u if keep else y
        read_by_a = None if lora_a is None else x if dropped is None else dropped
        ctx.save_for_backward(read_by_a, weight, lora_a, lora_b, h, norm, gain, saved)
        ctx.scale, ctx.read, ctx.shape, ctx.has_dropped, ctx.has_kept = scale, read, x.shape, dropped is not None, keep
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        low, weight, lora_a, lora_b, h, norm, gain, u = ctx.saved_tensors
        dtype = dy.dtype
        dy = dy.reshape(-1, dy.shape[-1])
        b = None if lora_b is None else (ctx.scale * lora_b).to(dtype)
        du, dh, dm = passes(dy.device).gradients(dy, None if u is None else u.view(dy.shape), gain, b)
        dx = ddropped = da = db = None
        if dm is not None:
            dm = dm / (norm if ctx.has_kept else norm * gain).masked_fill(norm == 0, 1.0)
            dm = dm.masked_fill(norm == 0, 0.0)  # a zero row's gain is the constant 1
        if ctx.needs_input_grad[0]:
            dx = du @ ctx.read(weight).to(dtype)
        if lora_a is not None:
            a = lora_a.to(dtype)
            if ctx.has_dropped:
                ddropped = (dh @ a).view(ctx.shape) if ctx.needs_input_grad[1] else None
            elif dx is not None:
                dx.addmm_(dh, a)
            da = (dh.T @ low.reshape(-1, ctx.shape[-1])).to(lora_a.dtype)
            db = (du.T @ h).to(lora_b.dtype).mul_(ctx.scale)
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, ddropped, None, None, da, db, dm, None, None, None


def epilogue(
    u: Tensor, h: Tensor | None, b: Tensor | None, gain: Tensor | None, bias: Tensor | None, keep: bool
) -> Tensor:
    """y = g ⊙ (u + hBᵀ) + b for u [rows, out], h [rows, r], B [out, r], g [out] in fp32 and b [out].

    Writes over u: y itself, or with `keep` the sum u + hBᵀ, beside a new y.
    """
    if h is not None and b is not None:
        u.addmm_(h, b.T)
    y = u.clone() if keep else u
    if gain is not None:
        g = gain.to(u.dtype)
        return y.mul_(g) if bias is None else torch.addcmul(bias, u, g, out=y)
    return y if bias is None else y.add_(bias)


def gradients(
    dy: Tensor, u: Tensor | None, gain: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """du = dy ⊙ g, dh = du B and Σ dy ⊙ u over the rows in fp32, for dy and u [rows, out], g [out] and B [out, r].

    Without a gain du is dy itself and there is no sum; without B there is no dh.
    """
    du, dm = dy, None
    if gain is not None and u is not None:
        du, dm = dy * gain.to(dy.dtype), torch.zeros_like(gain)
        ones = dy.new_ones(1, min(ROWS, dy.shape[0]))
        for start in range(0, dy.shape[0], ROWS):
            products = dy[start : start + ROWS] * u[start : start + ROWS]
            # A product with ones: it sums in fp32, and on a CPU nine times as fast as `sum` does.
            dm += (ones[:, : products.shape[0]] @ products)[0]
    return du, None if b is None else du @ b, dm


def passes(device: torch.device) -> Any:
    """Where `epilogue` and `gradients` for this device are: here, or fused in Triton for a GPU."""
    if device.type == "cuda" and _has_triton():
        from mmdora.adapters import kernels

        return kernels
    return sys.modules[__name__]


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def merged_weight(
    weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float, magnitude: Tensor | None
) -> Tensor:
    """The weight [..., out, in] of the plain layer that computes the same, in fp32."""
    merged = weight.float()
    if lora_a is not None and lora_b is not None:
        merged = merged + scale * (lora_b.float() @ lora_a.float())
    if magnitude is not None:
        merged = merged * dora_gain(magnitude, dora_norm(weight, lora_a, lora_b, scale))[..., None]
    return merged


class MergedWeightFunction(torch.autograd.Function):
    """W' = g ⊙ (W + sBA) for a frozen W [..., out, in], with gradients for A, B and m; saves W' and no other matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        magnitude: Tensor | None,
        norm: Tensor | None,
        scale: float,
    ) -> Tensor:
        merged = weight.clone()
        if lora_a is not None and lora_b is not None:
            merged += scale * (lora_b @ lora_a)
        gain = None
        if magnitude is not None:
            assert norm is not None
            gain = dora_gain(magnitude, norm)
            gain.masked_fill_(gain == 0, LEAST_GAIN)
            merged *= gain[..., None].to(weight.dtype)
        ctx.save_for_backward(lora_a, lora_b, gain, norm, None if gain is None else merged)
        ctx.scale = scale
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmerged: Tensor) -> tuple[Tensor | None, ...]:
        lora_a, lora_b, gain, norm, merged = ctx.saved_tensors
        da = db = dm = None
        if gain is not None:
            dm = (dmerged * merged).sum(-1, dtype=torch.float32) / (gain * norm).masked_fill(norm == 0, 1.0)
            dm = dm.masked_fill(norm == 0, 0.0)
            dmerged = dmerged * gain[..., None].to(dmerged.dtype)
        if lora_a is not None:
            dv = dmerged.to(lora_a.dtype)
            da, db = ctx.scale * (lora_b.mT @ dv), ctx.scale * (dv @ lora_a.mT)
        return None, da, db, dm, None, None
