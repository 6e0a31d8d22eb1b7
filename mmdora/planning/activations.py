"""Measure the activation memory of a training step by running it on the meta device, on tensors without values.

A 7B model takes seconds and no memory, and runs the operators of a real step. The batch has values and is on the CPU,
and so are tensors computed from it alone (masks, positions, grids), because model code reads their values. Every tensor
that depends on a weight is on the meta device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
ARANGE = {torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step}


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, without weights and buffers."""

    saved: int  # kept by autograd from the forward pass for the backward pass
    peak: int  # maximum at any moment, including one parameter's gradient
    peak_with_gradients: int  # maximum including all gradients computed so far


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of every storage created inside the block, from its first operator until it is freed."""

    def __init__(self, existing: list[Tensor]):
        super().__init__()
        self.known = {storage_key(tensor) for tensor in existing}
        self.live = self.gradients = self.peak = self.peak_with_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run_operator(func, args, kwargs or {})
        for tensor in tensors((out,)):
            self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key in self.known:
            return
        storage = tensor.untyped_storage()
        self.known.add(key)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def take_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient separately and drop it."""
        assert parameter.grad is not None
        size = parameter.grad.nbytes
        parameter.grad = None
        self.gradients += size
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def run_operator(func: Any, args: Any, kwargs: Any) -> Any:
    """Run one operator. If some of its tensors are on the meta device, the result is too."""
    inputs = [*tensors(args), *tensors(kwargs.values())]
    if not any(tensor.is_meta for tensor in inputs):
        default = inputs[0].dtype if inputs else torch.int64 if func in ARANGE else torch.float32
        dtype = kwargs.get("dtype") or default
        if "device" in kwargs and not dtype.is_floating_point:  # keep integers on the CPU, whatever device is given
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    if not all(tensor.is_meta for tensor in inputs):
        if func in INDEXING:  # a mask with values tells how many elements it selects
            args = (args[0], [index for mask in args[1] for index in _mask_indices(mask)], *args[2:])
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    return func(*args, **kwargs)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments or results, including those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


def _mask_indices(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the indices that a mask selects; anything but a mask unchanged."""
    is_mask = index is not None and index.dtype in (torch.bool, torch.uint8) and not index.is_meta
    return index.nonzero(as_tuple=True) if is_mask and index is not None else (index,)


class FusedAttention(torch.autograd.Function):
    """The memory of a fused attention kernel (CPU or GPU): saves q, k, v, the output and one number per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty_like(mask, dtype=q.dtype, device=q.device)  # the kernels add the mask to the scores
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), mask)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Replace attention inside the block; on the meta device torch decomposes it and would save all scores.

    The function itself is replaced, because a TorchFunctionMode is not active when checkpointed blocks are recomputed.
    """
    original = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not query.is_meta:
            return original(query, key, value, attn_mask, *args, **kwargs)
        return FusedAttention.apply(query, key, value, attn_mask)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextmanager
def _gradients_taken(model: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    handles = [p.register_post_accumulate_grad_hook(take) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(model: nn.Module, batch: dict[str, Any], loss_of: Callable[[Any], Tensor]) -> Activations:
    """Measure the forward and backward pass of one micro-batch.

    Args:
        model: on the meta device.
        batch: with values, on the CPU.
        loss_of: computes the loss from the model's output, as the trainer does.
    """
    existing = [*model.parameters(), *model.buffers(), *tensors(batch.values())]
    with StorageTracker(existing) as tracker, _fused_attention(), _gradients_taken(model, tracker.take_gradient):
        loss = loss_of(model(**batch))
        saved = tracker.live
        loss.backward()
        del loss
    return Activations(saved, tracker.peak, tracker.peak_with_gradients)
