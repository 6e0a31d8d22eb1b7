"""The autograd functions of LoRA and DoRA.

`AdaptedLinearFunction` computes linear layers. It saves few tensors for the backward pass and does no redundant matrix
product. `MergedWeightFunction` computes the weight W' itself, for layers whose forward pass is not a plain product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdora.adapters.ops import norm_cache
from mmdora.adapters.ops.functional import dora_gain, has_triton

CHUNK_ROWS = 256  # rows of an activation that are processed at once where temporaries are needed
# `MergedWeightFunction` replaces a gain of exactly zero by this, since it computes the magnitude's gradient from W'.
LEAST_GAIN = 1e-20


def as_is(weight: Tensor) -> Tensor:
    """Return a weight that is stored as [out, in]."""
    return weight


def transposed(weight: Tensor) -> Tensor:
    """Return [out, in] of a weight that is stored as [in, out]."""
    return weight.T


class LinearTerms(NamedTuple):
    """The tensors of one layer, which computes y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + b with g = m / ‖W + sBA‖."""

    weight: Tensor  # frozen
    bias: Tensor | None  # [out], frozen
    lora_a: Tensor | None  # [r, in]
    lora_b: Tensor | None  # [out, r]; A and B are None if only the magnitude is trained
    magnitude: Tensor | None  # [out]; None for LoRA
    dropped: Tensor | None  # [..., in], the input of the low-rank branch after dropout; None if that is x


class LinearSettings(NamedTuple):
    """The settings of one layer that are not tensors."""

    scale: float
    norm_key: int  # key of the layer's norm in the norm cache
    has_backward: bool  # whether a backward pass may follow; without gradients, nothing is kept for it
    read: Callable[[Tensor], Tensor] = as_is  # returns the weight as [out, in]


class AdaptedLinearFunction(torch.autograd.Function):
    """LoRA or DoRA on one or several linear layers that read the same x, with gradients for x and each A, B and m.

    One product multiplies x by the A of all layers, in the forward and in the backward pass, and the gradients of x
    are accumulated in place. Saved for the backward pass: x, h = xAᵀ and, for the gradient of m, u = xWᵀ + shBᵀ. xWᵀ
    and hBᵀ are never saved separately. Apart from the base layers' own two products, all matrix products have r as one
    dimension.

    An output is never saved, because the model may change it in place, and not every such change is visible to autograd
    (`y.data`, kernels that write into their input). u = y / g could be recovered from the output of a layer without
    bias. That would save memory where a later operation saves y too, but a changed y would give a wrong gradient.

    With `merged`, x is multiplied by W + sBA instead. That matrix is built in the forward pass and again in the
    backward pass, and is not saved.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: tuple[LinearSettings, ...], merged: bool, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return y [..., out] of each layer, for x [..., in] and the flattened `LinearTerms` of all layers."""
        layers, dtype, kernels = _terms(flat), x.dtype, kernels_for(x.device)
        rows = x.reshape(-1, x.shape[-1])
        hs: list[Tensor | None] = [None] * len(layers) if merged else _times_a(rows, layers)
        outputs: list[Tensor] = []
        kept: list[tuple[Tensor | None, ...]] = []  # u, gain and norm of each layer
        for t, own, h in zip(layers, settings, hs, strict=True):
            weight, a, b = own.read(t.weight), t.lora_a, t.lora_b
            if merged and a is not None and b is not None:
                weight = kernels.merge(weight.to(dtype), a.to(dtype), (own.scale * b).to(dtype), None)
                a = b = None
            u = rows @ weight.to(dtype).T
            gain = norm = None
            if t.magnitude is not None:
                norm = norm_cache.norm(weight, a, b, own.scale, own.norm_key)
                gain = dora_gain(t.magnitude, norm)
            b = None if b is None else (own.scale * b).to(dtype)
            bias, keep = None if t.bias is None else t.bias.to(dtype), gain is not None and own.has_backward
            y = kernels.epilogue(u, h, b, gain, bias, keep)
            # Autograd must not see a view: the outputs of a function that are views cannot be changed in place.
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
            kept.append((u if keep else None, gain, norm))
        us, gains, all_norms = zip(*kept, strict=True)
        ctx.save_for_backward(x if _reading_x(layers) else None, *flat, *hs, *us, *gains, *all_norms)
        ctx.settings, ctx.merged, ctx.shape = settings, merged, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        n = len(dys)
        x, *saved = ctx.saved_tensors
        layers, (hs, us, gains, all_norms) = _terms(saved[: -4 * n]), (saved[-i * n :][:n] for i in (4, 3, 2, 1))
        rows = None if x is None else x.reshape(-1, ctx.shape[-1])
        if ctx.merged:
            hs = _times_a(rows, layers)
        grads: list[dict[str, Tensor | None]] = [dict.fromkeys(LinearTerms._fields) for _ in layers]
        dhs: list[Tensor | None] = [None] * n
        dx: Tensor | None = None
        for i, (t, own, dy, gain, norm) in enumerate(zip(layers, ctx.settings, dys, gains, all_norms, strict=True)):
            if dy is None:  # the output was not used
                continue
            dtype, dy, kernels = dy.dtype, dy.reshape(-1, dy.shape[-1]), kernels_for(dy.device)
            b = None if t.lora_b is None else (own.scale * t.lora_b).to(dtype)
            u = None if us[i] is None else us[i].view(dy.shape)
            du, dhs[i], dm = kernels.gradients(dy, u, gain, b, not ctx.merged)
            if dm is not None:
                zero = norm == 0  # the gain of such a row is the constant 1
                grads[i]["magnitude"] = (dm / norm.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
            if ctx.needs_input_grad[0]:
                weight = own.read(t.weight).to(dtype)
                if ctx.merged and t.lora_a is not None:
                    weight = kernels.merge(weight, t.lora_a.to(dtype), b, gain)
                dx = du @ weight if dx is None else dx.addmm_(du, weight)
            if t.lora_b is not None:
                db = (du.T @ hs[i]).to(t.lora_b.dtype).mul_(own.scale)
                grads[i]["lora_b"] = db.mul_(gain[:, None]) if ctx.merged and gain is not None else db
        _low_rank_gradients(rows, layers, dhs, None if ctx.merged else dx, grads)
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, None, *(gradient for own in grads for gradient in own.values())


def _terms(flat: Sequence[Tensor | None]) -> list[LinearTerms]:
    width = len(LinearTerms._fields)
    return [LinearTerms(*flat[i : i + width]) for i in range(0, len(flat), width)]  # type: ignore[arg-type]


def _reading_x(layers: list[LinearTerms]) -> dict[int, Tensor]:
    """Return the A of each layer whose low-rank branch reads x itself (no dropout), by index."""
    return {i: t.lora_a for i, t in enumerate(layers) if t.lora_a is not None and t.dropped is None}


def _times_a(rows: Tensor | None, layers: list[LinearTerms]) -> list[Tensor | None]:
    """Return h = xAᵀ [rows, r] of each layer that has an A, with one product for all layers that read x itself."""
    hs: list[Tensor | None] = [None] * len(layers)
    for i, t in enumerate(layers):
        if t.lora_a is not None and t.dropped is not None:
            hs[i] = t.dropped.reshape(-1, t.dropped.shape[-1]) @ t.lora_a.to(t.dropped.dtype).T
    if reading := _reading_x(layers):
        assert rows is not None
        h = rows @ torch.cat(list(reading.values())).to(rows.dtype).T
        for i, part in zip(reading, h.split([len(a) for a in reading.values()], dim=1), strict=True):
            hs[i] = part
    return hs


def _low_rank_gradients(
    rows: Tensor | None,
    layers: list[LinearTerms],
    dhs: list[Tensor | None],
    dx: Tensor | None,
    grads: list[dict[str, Tensor | None]],
) -> None:
    """Compute the gradients of A and of dropped inputs from those of h into `grads`, and add that of x to `dx`."""
    for t, dh, own in zip(layers, dhs, grads, strict=True):
        if t.lora_a is not None and t.dropped is not None and dh is not None:
            own["lora_a"] = (dh.T @ t.dropped.reshape(-1, t.dropped.shape[-1])).to(t.lora_a.dtype)
            own["dropped"] = (dh @ t.lora_a.to(dh.dtype)).view(t.dropped.shape)
    reading = {i: a for i, a in _reading_x(layers).items() if dhs[i] is not None}
    if reading:
        assert rows is not None
        a, dh = torch.cat(list(reading.values())), torch.cat([dhs[i] for i in reading], dim=1)  # type: ignore[misc]
        if dx is not None:
            dx.addmm_(dh, a.to(dh.dtype))
        das = (dh.T @ rows).to(a.dtype).split([len(a) for a in reading.values()])
        for i, da in zip(reading, das, strict=True):
            grads[i]["lora_a"] = da


def epilogue(
    u: Tensor, h: Tensor | None, b: Tensor | None, gain: Tensor | None, bias: Tensor | None, keep: bool
) -> Tensor:
    """Return y = g ⊙ (u + hBᵀ) + b for u [rows, out], h [rows, r], B [out, r], g [out] in fp32 and b [out].

    u is overwritten: with y itself, or with `keep` by the sum u + hBᵀ, and y is then a new tensor.
    """
    if h is not None and b is not None:
        u.addmm_(h, b.T)
    if gain is None:
        y = u.clone() if keep else u
        return y if bias is None else y.add_(bias)
    g, y = gain.to(u.dtype), torch.empty_like(u) if keep else u
    return torch.mul(u, g, out=y) if bias is None else torch.addcmul(bias, u, g, out=y)


def gradients(
    dy: Tensor, u: Tensor | None, gain: Tensor | None, b: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return du = dy ⊙ g, dh = du B and Σ dy ⊙ u over the rows in fp32, for dy and u [rows, out], g [out], B [out, r].

    Without a gain, or if `scaled` is false, du is dy itself. The sum is None without a gain, and dh is None without B.
    """
    du, dm = dy, None
    if gain is not None and u is not None:
        dm = torch.zeros_like(gain)
        # A small buffer stays in the CPU cache and needs no new pages. A product with ones accumulates in fp32 and is
        # nine times as fast as `sum` on a CPU.
        ones, buffer = dy.new_ones(1, CHUNK_ROWS), dy.new_empty(min(CHUNK_ROWS, dy.shape[0]), dy.shape[1])
        end = min(dy.shape[0], CHUNK_ROWS) if dy.is_meta else dy.shape[0]  # without data, one chunk is enough
        for start in range(0, end, CHUNK_ROWS):
            chunk = dy[start : start + CHUNK_ROWS]
            products = torch.mul(chunk, u[start : start + CHUNK_ROWS], out=buffer[: len(chunk)])
            dm += (ones[:, : len(chunk)] @ products)[0]
        if scaled:
            du = dy * gain.to(dy.dtype)
        elif b is not None:
            b = (gain[:, None] * b).to(b.dtype)
    return du, None if b is None else du @ b, dm


def merge(weight: Tensor, a: Tensor, b: Tensor, gain: Tensor | None) -> Tensor:
    """Return g ⊙ (W + BA) [out, in], for W, A [r, in] and B [out, r] of one dtype and g [out] in fp32."""
    merged = torch.addmm(weight, b, a)
    return merged if gain is None else merged.mul_(gain[:, None].to(merged.dtype))


def kernels_for(device: torch.device) -> Any:
    """Return the module whose `epilogue`, `gradients` and `merge` run on the device: this one, or Triton's on a GPU."""
    if device.type == "cuda" and has_triton():
        from mmdora.adapters.ops import triton_kernels

        return triton_kernels
    return sys.modules[__name__]


class MergedWeightFunction(torch.autograd.Function):
    """W' = g ⊙ (W + sBA) for a frozen W [..., out, in], with gradients for A, B and m.

    The only matrix saved for the backward pass is W'.
    """

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
