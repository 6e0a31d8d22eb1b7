"""What a training step keeps in memory, found by running it on tensors that have shapes and no numbers.

The model is on the meta device, so that a 7B one costs seconds and no memory; the operators are those of a real step.
A batch is real and on the CPU, and so is what is made of it alone (masks, positions, grids), since code looks at it;
what has met a weight has a shape and no numbers.
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

COUNTING = {torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step}


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, beside weights and what the model holds all the time."""

    saved: int  # what autograd keeps from the forward pass for the backward pass
    peak: int  # the most at any moment, one parameter's gradient included
    peak_with_gradients: int  # the most together with all gradients computed until then


class Meter(TorchDispatchMode):
    """Counts every storage that comes to be inside it, once, from its first operator to its end."""

    def __init__(self, held: list[Tensor]):
        super().__init__()
        self.known = {storage_key(tensor) for tensor in held}
        self.live = self.gradients = self.peak = self.peak_with_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run(func, args, kwargs or {})
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
        """Count a parameter's gradient apart and drop it."""
        assert parameter.grad is not None
        size = parameter.grad.nbytes
        parameter.grad = None
        self.gradients += size
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.gradients)


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operator. Where tensors with and without numbers meet, the result has none."""
    found = [*tensors(args), *tensors(kwargs.values())]
    if not any(tensor.is_meta for tensor in found):
        asked = kwargs.get("dtype") or (found[0].dtype if found else torch.int64 if func in COUNTING else torch.float32)
        if "device" in kwargs and not asked.is_floating_point:  # numbers stay, whatever device they shall go to
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    if not all(tensor.is_meta for tensor in found):
        if func in INDEXING:  # where a mask has numbers, it tells how much it selects
            args = (args[0], [place for mask in args[1] for place in _places(mask)], *args[2:])
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    return func(*args, **kwargs)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operator's arguments or results, which are nested no deeper than one list."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (each for each in value if isinstance(each, Tensor))


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a mask selects, as indices."""
    masks = index is not None and index.dtype in (torch.bool, torch.uint8) and not index.is_meta
    return index.nonzero(as_tuple=True) if masks and index is not None else (index,)


class FusedAttention(torch.autograd.Function):
    """The memory of a fused attention kernel, a CPU's or a GPU's: saves q, k, v, the output and one number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty_like(mask, dtype=q.dtype, device=q.device)  # the kernels add it
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), mask)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch takes attention apart, and would keep every score.

    Replaced by name, since a TorchFunctionMode is off where checkpointed blocks are computed again.
    """
    torchs = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not query.is_meta:
            return torchs(query, key, value, attn_mask, *args, **kwargs)
        return FusedAttention.apply(query, key, value, attn_mask)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = torchs


@contextmanager
def _gradients_taken(model: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    handles = [p.register_post_accumulate_grad_hook(take) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(model: nn.Module, batch: dict[str, Any], loss_of: Callable[[Any], Tensor]) -> Activations:
    """One micro-batch of a model on the meta device, forward and backward. `batch` is real, on the CPU.

    `loss_of` makes the loss of what the model returns, as the trainer does.
    """
    held = [*model.parameters(), *model.buffers(), *tensors(batch.values())]
    with Meter(held) as meter, _fused_attention(), _gradients_taken(model, meter.take_gradient):
        loss = loss_of(model(**batch))
        saved = meter.live
        loss.backward()
        del loss
    return Activations(saved, meter.peak, meter.peak_with_gradients)
