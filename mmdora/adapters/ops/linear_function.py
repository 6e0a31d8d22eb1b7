"""LoRA and DoRA on linear layers, as one autograd function that saves little and multiplies no more than it must."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdora.adapters.ops import norm_cache
from mmdora.adapters.ops.functional import LEAST_GAIN, dora_gain, has_triton

ROWS = 256  # of an activation at once, where a pass over it has temporaries


def as_is(weight: Tensor) -> Tensor:
    """A frozen weight that is stored as the matrix [out, in]."""
    return weight


def transposed(weight: Tensor) -> Tensor:
    """A frozen weight that is stored as [in, out]."""
    return weight.T


class LinearTerms(NamedTuple):
    """The tensors of one layer: y = g ⊙ (xWᵀ + s(xAᵀ)Bᵀ) + b, with g = m / ‖W + sBA‖."""

    weight: Tensor  # frozen
    bias: Tensor | None  # [out], frozen
    lora_a: Tensor | None  # [r, in]
    lora_b: Tensor | None  # [out, r]; None: the magnitude alone
    magnitude: Tensor | None  # [out]; None: LoRA
    dropped: Tensor | None  # [..., in]: what the low-rank branch reads; None: x


class LinearForm(NamedTuple):
    """What else there is to say about one layer."""

    scale: float
    key: int  # under which its norm is kept
    read: Callable[[Tensor], Tensor] = as_is  # makes the weight [out, in]


class AdaptedLinearFunction(torch.autograd.Function):
    """LoRA or DoRA on linear layers that read the same x; gradients for x, A, B and m of each.

    x meets the A of all layers in one product, forward and backward, and its gradients are summed where they arise.
    Saves x, h = xAᵀ and, for dm, the output itself where there is no bias (u = y / g), else the pre-bias u; never the
    two products apart. Beside the base layers' own two, all matrix products are skinny. With `merged`, x meets
    W + sBA, which is built for the forward pass and again for the backward pass, and never kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forms: tuple[LinearForm, ...], merged: bool, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        """x [..., in] and the `LinearTerms` of every layer, one after another; returns y [..., out] of each."""
        layers, dtype, device = _terms(flat), x.dtype, passes(x.device)
        rows = x.reshape(-1, x.shape[-1])
        hs: list[Tensor | None] = [None] * len(layers) if merged else _times_a(rows, layers)
        outputs: list[Tensor] = []
        kept: list[tuple[Tensor | None, ...]] = []  # u, gain and norm of every layer
        for t, form, h in zip(layers, forms, hs, strict=True):
            weight, a, b = form.read(t.weight), t.lora_a, t.lora_b
            if merged and a is not None and b is not None:
                weight = device.merge(weight.to(dtype), a.to(dtype), (form.scale * b).to(dtype), None)
                a = b = None
            u = rows @ weight.to(dtype).T
            gain = norm = None
            if t.magnitude is not None:
                norm = norm_cache.norm(weight, a, b, form.scale, form.key)
                gain = dora_gain(t.magnitude, norm)
                gain.masked_fill_(gain == 0, LEAST_GAIN)
            b = None if b is None else (form.scale * b).to(dtype)
            bias, keep = None if t.bias is None else t.bias.to(dtype), _keeps_u(t, dtype)
            y = device.epilogue(u, h, b, gain, bias, keep)
            # Not a view for autograd, which would forbid to change the output in place.
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
            kept.append((None if gain is None else u if keep else outputs[-1], gain, norm))
        us, gains, all_norms = zip(*kept, strict=True)
        ctx.save_for_backward(x if _reading_x(layers) else None, *flat, *hs, *us, *gains, *all_norms)
        ctx.forms, ctx.merged, ctx.shape = forms, merged, x.shape
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
        for i, (t, form, dy, gain, norm) in enumerate(zip(layers, ctx.forms, dys, gains, all_norms, strict=True)):
            if dy is None:  # nobody used that output
                continue
            dtype, dy, device = dy.dtype, dy.reshape(-1, dy.shape[-1]), passes(dy.device)
            b = None if t.lora_b is None else (form.scale * t.lora_b).to(dtype)
            u = None if us[i] is None else us[i].view(dy.shape)
            du, dhs[i], dm = device.gradients(dy, u, gain, b, not ctx.merged)
            if dm is not None:
                zero = norm == 0  # such a row's gain is the constant 1
                divisor = (norm if _keeps_u(t, dtype) else norm * gain).masked_fill(zero, 1.0)
                grads[i]["magnitude"] = (dm / divisor).masked_fill(zero, 0.0)
            if ctx.needs_input_grad[0]:
                weight = form.read(t.weight).to(dtype)
                if ctx.merged and t.lora_a is not None:
                    weight = device.merge(weight, t.lora_a.to(dtype), b, gain)
                dx = du @ weight if dx is None else dx.addmm_(du, weight)
            if t.lora_b is not None:
                db = (du.T @ hs[i]).to(t.lora_b.dtype).mul_(form.scale)
                grads[i]["lora_b"] = db.mul_(gain[:, None]) if ctx.merged and gain is not None else db
        _low_rank_gradients(rows, layers, dhs, None if ctx.merged else dx, grads)
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, None, *(gradient for found in grads for gradient in found.values())


def _terms(flat: Sequence[Tensor | None]) -> list[LinearTerms]:
    width = len(LinearTerms._fields)
    return [LinearTerms(*flat[i : i + width]) for i in range(0, len(flat), width)]  # type: ignore[arg-type]


def _keeps_u(layer: LinearTerms, dtype: torch.dtype) -> bool:
    """Whether the pre-bias u is saved beside y. fp16's range is too small to find u again from y = u * g."""
    return layer.magnitude is not None and (layer.bias is not None or dtype == torch.float16)


def _reading_x(layers: list[LinearTerms]) -> dict[int, Tensor]:
    """A of those layers whose low-rank branch reads x itself, by place."""
    return {i: t.lora_a for i, t in enumerate(layers) if t.lora_a is not None and t.dropped is None}


def _times_a(rows: Tensor | None, layers: list[LinearTerms]) -> list[Tensor | None]:
    """h = xAᵀ [rows, r] of every layer that has an A; one product for all that read x itself."""
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
    """From the gradients of h: those of A and of dropped inputs into `grads`, that of x added to `dx`."""
    for t, dh, found in zip(layers, dhs, grads, strict=True):
        if t.lora_a is not None and t.dropped is not None and dh is not None:
            found["lora_a"] = (dh.T @ t.dropped.reshape(-1, t.dropped.shape[-1])).to(t.lora_a.dtype)
            found["dropped"] = (dh @ t.lora_a.to(dh.dtype)).view(t.dropped.shape)
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
    dy: Tensor, u: Tensor | None, gain: Tensor | None, b: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """du = dy ⊙ g, dh = du B and Σ dy ⊙ u over the rows in fp32, for dy and u [rows, out], g [out] and B [out, r].

    Without a gain, or unless `scaled`, du is dy itself. Without a gain there is no sum, without B no dh.
    """
    du, dm = dy, None
    if gain is not None and u is not None:
        dm = torch.zeros_like(gain)
        # A small buffer stays in the cache and needs no fresh pages; a product with ones sums in fp32, and on a CPU
        # nine times as fast as `sum` does.
        ones, buffer = dy.new_ones(1, ROWS), dy.new_empty(min(ROWS, dy.shape[0]), dy.shape[1])
        for start in range(0, min(dy.shape[0], ROWS) if dy.is_meta else dy.shape[0], ROWS):  # no numbers: once will do
            some = dy[start : start + ROWS]
            products = torch.mul(some, u[start : start + ROWS], out=buffer[: len(some)])
            dm += (ones[:, : len(some)] @ products)[0]
        if scaled:
            du = dy * gain.to(dy.dtype)
        elif b is not None:
            b = (gain[:, None] * b).to(b.dtype)
    return du, None if b is None else du @ b, dm


def merge(weight: Tensor, a: Tensor, b: Tensor, gain: Tensor | None) -> Tensor:
    """g ⊙ (W + BA) [out, in], for W, A [r, in] and B [out, r] in one dtype and g [out] in fp32."""
    merged = torch.addmm(weight, b, a)
    return merged if gain is None else merged.mul_(gain[:, None].to(merged.dtype))


def passes(device: torch.device) -> Any:
    """Where `epilogue`, `gradients` and `merge` for this device are: here, or fused in Triton for a GPU."""
    if device.type == "cuda" and has_triton():
        from mmdora.adapters.ops import triton_kernels

        return triton_kernels
    return sys.modules[__name__]
