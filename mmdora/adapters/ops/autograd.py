"""The autograd functions of LoRA and DoRA.

`AdaptedLinearFunction` computes linear layers. It saves few tensors for the backward pass and does no redundant matrix
product. `MergedWeightFunction` computes the weight W' itself, for layers whose forward pass is not a plain product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdora.adapters.ops import norm_cache, torch_kernels
from mmdora.adapters.ops.functional import dora_gain, expert_slices, has_triton, working_dtype

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
    are accumulated in place. Saved for the backward pass: x, h = xAᵀ and, for the gradient of m, u, the base layer's
    output. That gradient needs hBᵀ too; it follows from dyᵀh, which the gradient of B needs. Apart from the base
    layers' own two products, all matrix products have r as one dimension.

    Neither u nor an output is changed after it was computed: selective activation checkpointing may have saved u, and
    the model may change an output in place, not always visibly to autograd (`y.data`, kernels that write into their
    input). So no output is saved either. u could be recovered from the output. That would save memory where a later
    operation saves y too, but a changed y would give a wrong gradient.

    With `merged`, x is multiplied by W + sBA instead. That matrix is built in the forward pass and again in the
    backward pass, and is not saved.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: tuple[LinearSettings, ...], merged: bool, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return y [..., out] of each layer, for x [..., in] and the flattened `LinearTerms` of all layers."""
        layers, dtype, kernels = _terms(flat), x.dtype, kernels_for(x.device)
        working = kernels.working_dtype(dtype)
        rows = x.reshape(-1, x.shape[-1])
        hs: list[Tensor | None] = [None] * len(layers) if merged else _times_a(rows, layers)
        outputs: list[Tensor] = []
        kept: list[tuple[Tensor | None, ...]] = []  # u, gain and norm of each layer
        for t, own, h in zip(layers, settings, hs, strict=True):
            weight, a, b = own.read(t.weight), t.lora_a, t.lora_b
            used = weight.to(dtype)
            if merged and a is not None and b is not None:
                used = kernels.merge(used, a.to(working), (own.scale * b).to(working), None)
            # As in a plain layer, the bias is added before the product is rounded: y = g ⊙ (u + hBᵀ) + (1 − g) ⊙ b.
            bias = None if t.bias is None else t.bias.to(dtype)
            u = rows @ used.T if bias is None else torch.addmm(bias, rows, used.T)
            gain = norm = None
            if t.magnitude is not None:
                # Where the merged weight is exact, its norm needs no other sum.
                terms = (used, None, None) if merged and weight.dtype == torch.float32 == dtype else (weight, a, b)
                norm = norm_cache.norm(*terms, own.scale, own.norm_key)
                gain = dora_gain(t.magnitude, norm)
            b = None if b is None or h is None else (own.scale * b).to(working)
            rest = None if bias is None or gain is None else (1 - gain) * bias
            y = kernels.epilogue(u, h, b, gain, rest, own.has_backward)
            # Autograd must not see a view: the outputs of a function that are views cannot be changed in place.
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
            kept.append((u if gain is not None and own.has_backward else None, gain, norm))
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
            b = None if t.lora_b is None else (own.scale * t.lora_b).to(kernels.working_dtype(dtype))
            u = None if us[i] is None else us[i].view(dy.shape)
            bias = None if t.bias is None else t.bias.to(dtype)
            du, dhs[i], du_sum = kernels.gradients(dy, u, gain, bias, b, not ctx.merged)
            db, dm = parameter_gradients(dy, hs[i], b, own.scale, gain, norm, du_sum, not ctx.merged)
            grads[i]["magnitude"] = dm
            grads[i]["lora_b"] = None if db is None else db.to(t.lora_b.dtype)  # type: ignore[union-attr]
            if ctx.needs_input_grad[0]:
                weight = own.read(t.weight).to(dtype)
                if ctx.merged and t.lora_a is not None:
                    weight = kernels.merge(weight, t.lora_a.to(b.dtype), b, gain)  # type: ignore[union-attr]
                dx = du @ weight if dx is None else dx.addmm_(du, weight)
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
            hs[i] = _h(t.dropped.reshape(-1, t.dropped.shape[-1]), t.lora_a)
    if reading := _reading_x(layers):
        assert rows is not None
        h = _h(rows, torch.cat(list(reading.values())))
        for i, part in zip(reading, h.split([len(a) for a in reading.values()], dim=1), strict=True):
            hs[i] = part
    return hs


def _h(x: Tensor, a: Tensor) -> Tensor:
    return torch_kernels.times_transposed(x, a.to(kernels_for(x.device).working_dtype(x.dtype)))


def parameter_gradients(
    dy: Tensor,
    h: Tensor | None,
    b: Tensor | None,
    scale: float,
    gain: Tensor | None,
    norm: Tensor | None,
    du_sum: Tensor | None,
    add_low_rank: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of B and m in fp32, with one product dyᵀh for both.

    `b` is sB, and `du_sum` is Σ dy ⊙ u over the rows, without the bias; with `add_low_rank`, u lacks hBᵀ.
    """
    db = dm = None
    if h is not None and b is not None:
        product = torch_kernels.transposed_times(dy, h).to(torch.promote_types(b.dtype, torch.float32))
        if du_sum is not None and add_low_rank:
            du_sum = du_sum + (product * b).sum(1)
        db = product.mul_(scale if gain is None else scale * gain[:, None])
    if du_sum is not None and norm is not None:
        dm = magnitude_gradient(du_sum, norm)
    return db, dm


def magnitude_gradient(du_sum: Tensor, norm: Tensor) -> Tensor:
    """Return the gradient of m [out]: Σ dy ⊙ u / n, and 0 where n is 0, since the gain is the constant 1 there."""
    zero = norm == 0
    return (du_sum / norm.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


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
            dropped = t.dropped.reshape(-1, t.dropped.shape[-1])
            own["lora_a"] = torch_kernels.transposed_times(dropped, dh).T.to(t.lora_a.dtype)
            own["dropped"] = torch_kernels.product(dh, t.lora_a.to(dh.dtype), dropped.dtype).view(t.dropped.shape)
    reading = {i: a for i, a in _reading_x(layers).items() if dhs[i] is not None}
    if reading:
        assert rows is not None
        a, dh = torch.cat(list(reading.values())), torch.cat([dhs[i] for i in reading], dim=1)  # type: ignore[misc]
        if dx is not None:
            torch_kernels.add_product(dx, dh, a.to(dh.dtype))
        das = torch_kernels.transposed_times(rows, dh).T.to(a.dtype).split([len(a) for a in reading.values()])
        for i, da in zip(reading, das, strict=True):
            grads[i]["lora_a"] = da


def kernels_for(device: torch.device) -> Any:
    """Return the module whose `epilogue`, `gradients` and `merge` run on a device: on a GPU, that of Triton's kernels.

    Products with h alone are those of `torch_kernels` everywhere.
    """
    if device.type == "cuda" and has_triton():
        from mmdora.adapters.ops import triton_kernels

        return triton_kernels
    return torch_kernels


class MergedWeightFunction(torch.autograd.Function):
    """W' = g ⊙ (W + sBA) for a frozen W [experts, out, in], with gradients for A, B and m.

    W' is computed in fp32 and rounded once. It is the only matrix saved for the backward pass.
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
        merged, working = torch.empty_like(weight), working_dtype(weight.dtype)
        gain = None
        if magnitude is not None:
            assert norm is not None
            gain = dora_gain(magnitude, norm)
            gain.masked_fill_(gain == 0, LEAST_GAIN)
        for experts in expert_slices(weight):
            part = weight[experts].to(working, copy=True)
            if lora_a is not None and lora_b is not None:
                part.baddbmm_((scale * lora_b[experts]).to(working), lora_a[experts].to(working))
            merged[experts] = part if gain is None else part.mul_(gain[experts, :, None])
        ctx.save_for_backward(lora_a, lora_b, gain, norm, None if gain is None else merged)
        ctx.scale = scale
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmerged: Tensor) -> tuple[Tensor | None, ...]:
        lora_a, lora_b, gain, norm, merged = ctx.saved_tensors
        da, db, dm = (None if t is None else torch.empty_like(t) for t in (lora_a, lora_b, gain))
        for experts in expert_slices(dmerged):
            part = dmerged[experts].to(working_dtype(dmerged.dtype), copy=True)
            if dm is not None:
                dm[experts] = (part * merged[experts]).sum(-1)
                part.mul_(gain[experts, :, None])
            if da is not None and db is not None:
                a, b = lora_a[experts].to(part.dtype), lora_b[experts].to(part.dtype)
                da[experts], db[experts] = ctx.scale * (b.mT @ part), ctx.scale * (part @ a.mT)
        if dm is not None:
            dm = (dm / (gain * norm).masked_fill(norm == 0, 1.0)).masked_fill(norm == 0, 0.0)
        return None, da, db, dm, None, None
