"""The mathematics of LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353), as pure functions on tensors.

DoRA's weight is W' = m ⊙ (W + sBA) / ‖W + sBA‖, where the norm is taken over each row of torch's [out, in] weight. The
norm n is a constant in the backward pass (§4.3 of the DoRA paper). The bias is not scaled:
y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + b, with the gain g = m / n.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

# If ‖W + sBA‖² is below this fraction of ‖W‖² + ‖sBA‖², the summands of the factored form cancel (W ≈ −sBA) and it is
# no longer exact to 1e-6.
CANCELLATION = 0.1


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@torch.no_grad()
def dora_norm(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float) -> Tensor:
    """Return the row norms n = ‖W + sBA‖ [..., out] in fp32 without building BA; ‖W‖ if A and B are None.

    n² = ‖W‖² + 2s·rowsum((WAᵀ) ⊙ B) + s²·rowsum((B(AAᵀ)) ⊙ B) for W [..., out, in], A [..., r, in] and B [..., out, r].
    Rows whose summands cancel are computed densely. On a GPU, a Triton kernel computes every row densely.
    """
    if lora_a is None or lora_b is None:
        return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32)
    if weight.is_cuda and weight.dim() == 2 and has_triton():
        from mmdora.adapters.ops import triton_kernels

        # The kernel needs no data-dependent branch, which would synchronize with the GPU.
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
    """Return W Aᵀ [..., out, r] in fp32.

    To avoid an fp32 copy of a half-precision W, A is split into a high and a low half-precision part.
    """
    if weight.dtype == torch.float32:
        return weight @ a.mT
    high = a.to(weight.dtype)
    low = (a - high.float()).to(weight.dtype)
    return (weight @ torch.cat([high, low], dim=-2).mT).float().unflatten(-1, (2, -1)).sum(-2)


def dora_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return g = m / n [out] in fp32, differentiable in m. A row with n = 0 has no direction; its gain is 1."""
    zero = norm == 0
    return (magnitude.float() / norm.masked_fill(zero, 1.0)).masked_fill(zero, 1.0)


def merged_weight(
    weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float, magnitude: Tensor | None
) -> Tensor:
    """Return W' [..., out, in] in fp32: the weight of a plain layer that computes the same as the adapted one.

    Without A and B, only the magnitude applies; without a magnitude, the result is LoRA's W + sBA.
    """
    merged = weight.float()
    if lora_a is not None and lora_b is not None:
        merged = merged + scale * (lora_b.float() @ lora_a.float())
    if magnitude is not None:
        merged = merged * dora_gain(magnitude, dora_norm(weight, lora_a, lora_b, scale))[..., None]
    return merged
