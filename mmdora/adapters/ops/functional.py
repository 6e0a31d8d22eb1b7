"""The mathematics of LoRA and DoRA (arXiv 2106.09685, 2402.09353), as pure functions on tensors.

W' = m ⊙ (W + sBA) / ‖W + sBA‖, with the norm over each row of torch's [out, in] weight. The norm n is a constant in the
backward pass (§4.3 of the DoRA paper), and the bias stands outside: y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + b with g = m / n.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this share of the summands' size, the factored norm has cancelled too far to be exact to 1e-6 (W ≈ −sBA).
CANCELLATION = 0.1
# What a gain of exactly zero is computed as, so that the magnitude's gradient can be taken from the output.
LEAST_GAIN = 1e-20


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.no_grad()
def dora_norm(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float) -> Tensor:
    """Row norms ‖W + sBA‖ in fp32 [..., out], without building BA; ‖W‖ where A and B are None.

    Of W [..., out, in], A [..., r, in] and B [..., out, r]: n² = ‖W‖² + 2s·rowsum((WAᵀ) ⊙ B) + s²·rowsum((B(AAᵀ)) ⊙ B).
    Rows where this cancels are computed densely. On a GPU, Triton computes all of them so.
    """
    if lora_a is None or lora_b is None:
        return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32)
    if weight.is_cuda and weight.dim() == 2 and has_triton():
        from mmdora.adapters.ops import triton_kernels

        # Dense, and without a branch that would wait for the GPU.
        return triton_kernels.norm(weight, lora_a.float(), lora_b.float(), scale)
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
