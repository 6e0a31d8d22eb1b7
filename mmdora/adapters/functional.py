"""The mathematics of DoRA (arXiv 2402.09353), as pure functions on tensors.

W' = m ⊙ (W + sBA) / ‖W + sBA‖, with the norm over each row of torch's [out, in] weight. The norm n is a constant in the
backward pass (§4.3 of the paper), and the bias stands outside: y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + b with g = m / n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Below this share of the summands' size, the factored norm has cancelled too far to be trusted (W ≈ −sBA).
CANCELLATION = 1e-3


@torch.no_grad()
def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Row norms ‖W + sBA‖ in fp32, shape [out], without building BA.

    n² = ‖W‖² + 2s·rowsum((WAᵀ) ⊙ B) + s²·rowsum((B(AAᵀ)) ⊙ B). Rows where this cancels are computed densely.
    """
    a, b = lora_a.float(), lora_b.float()
    w = weight.float()
    w2 = w.square().sum(1)
    cross = ((w @ a.T) * b).sum(1)
    ba2 = ((b @ (a @ a.T)) * b).sum(1)
    squared = w2 + 2 * scale * cross + scale**2 * ba2
    cancelled = squared < CANCELLATION * (w2 + scale**2 * ba2)
    if cancelled.any():
        rows = w[cancelled] + scale * (b[cancelled] @ a)
        squared[cancelled] = rows.square().sum(1)
    return squared.clamp_min(0).sqrt()


def dora_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / n in fp32; 1 for a zero row, which has no direction that a magnitude could scale."""
    zero = norm == 0
    return torch.where(zero, torch.ones_like(norm), magnitude.float() / norm.masked_fill(zero, 1.0))


class DoRALinear(torch.autograd.Function):
    """y = g ⊙ (xWᵀ + s·hBᵀ) + b, for a frozen W and h = dropout(x)Aᵀ.

    Saves x, h and the pre-bias output u (not the two products): dm comes from Σ dy ⊙ u.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., in]
        weight: Tensor,  # [out, in], frozen
        bias: Tensor | None,  # [out], frozen
        h: Tensor,  # [..., r]
        lora_b: Tensor,  # [out, r]
        magnitude: Tensor,  # [out]
        norm: Tensor,  # [out], fp32, a constant
        scale: float,
    ) -> Tensor:
        gain = dora_gain(magnitude, norm)
        u = F.linear(x, weight) + scale * F.linear(h, lora_b.to(h.dtype))
        y = u * gain.to(u.dtype)
        if bias is not None:
            y = y + bias
        ctx.save_for_backward(x, weight, h, lora_b, magnitude, norm, u)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, h, lora_b, magnitude, norm, u = ctx.saved_tensors
        gain = dora_gain(magnitude, norm)
        du = dy * gain.to(dy.dtype)
        flat_du = du.flatten(0, -2)
        dx = du @ weight if ctx.needs_input_grad[0] else None
        dh = ctx.scale * (du @ lora_b.to(du.dtype))
        db = ctx.scale * (flat_du.T @ h.flatten(0, -2))
        # A zero row's gain is the constant 1, so its magnitude gets no gradient.
        zero = norm == 0
        dm = (dy * u).flatten(0, -2).sum(0, dtype=torch.float32) / norm.masked_fill(zero, 1.0)
        dm = dm.masked_fill(zero, 0.0)
        return dx, None, None, dh, db.to(lora_b.dtype), dm.to(magnitude.dtype), None, None


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, magnitude: Tensor | None) -> Tensor:
    """The weight [out, in] of the plain layer that computes the same, in the weight's own dtype (computed in fp32)."""
    merged = weight.float() + scale * (lora_b.float() @ lora_a.float())
    if magnitude is not None:
        merged *= dora_gain(magnitude, dora_norm(weight, lora_a, lora_b, scale))[:, None]
    return merged.to(weight.dtype)
