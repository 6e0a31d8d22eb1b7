"""The loss without logits: only supervised rows go through the head, a chunk of rows at a time.

The logits of 8 samples of 2,048 tokens with a vocabulary of 152k take 10 GiB in fp32, and cross-entropy needs several
times that. Here the head, the loss and the gradients of both are computed per chunk, so that the logits of one chunk
exist at a time and no computation is repeated. The head may be any linear layer: frozen, trained, with adapters, with
new tokens, quantized, or partitioned by ZeRO-3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data_pipelines.encoding import IGNORED
from mmdora.core.deepspeed import as_one_call, gather_in_forward
from mmdora.models.architectures import embeddings_of
from mmdora.training.deferred_logits import DeferredLogits, Recipe

CHUNK_BYTES = 96 * 2**20  # size of a chunk's logits in fp32; the loss takes three times as much
# Without it, gradients of the logits, most of which are near 1 / vocabulary, would be rounded to 0 in fp16.
FP16_GRADIENT = 256.0

log = logging.getLogger(__name__)


class ChunkedLoss:
    """A context manager in which the model computes its loss in chunks, by its own forward pass.

    The model's head is replaced, as its parents see it, by a function that returns `DeferredLogits`. If the model has
    no linear head, it computes its loss as always.
    """

    def __init__(self, model: Any):
        heads = (embeddings_of(module, "output") for module in model.modules())  # a model inside it may hold the head
        head = next((head for head in heads if isinstance(head, nn.Linear)), None)
        self.holders: list[tuple[nn.Module, str]] = []
        self.items: Tensor | None = None
        if head is None:
            log.warning("%s has no linear head, so its loss is computed from all logits", type(model).__name__)
            return
        self.deferred = _DeferredHead(head, type(model).__name__, self)
        for module in model.modules():
            self.holders += [(module, name) for name, child in module._modules.items() if child is head]

    def dividing_by(self, items: Tensor | None) -> ChunkedLoss:
        """Return itself, for a loss that will be divided by this number of tokens.

        Gradients are right for any number, but are rounded once more if it is not this one.
        """
        self.items = items
        return self

    def __enter__(self) -> None:
        for module, name in self.holders:
            module.__dict__[name] = self.deferred  # found before the module's children

    def __exit__(self, *error: object) -> None:
        for module, name in self.holders:
            module.__dict__.pop(name, None)

    def gather_head(self) -> None:
        """Have ZeRO-3 gather new tokens' rows with the head. Call it before DeepSpeed takes the model over."""
        if self.holders:
            head = self.deferred.head
            gather_in_forward(head, [p for child in head.children() for p in child.parameters()])


class _DeferredHead:
    def __init__(self, head: nn.Linear, name: str, settings: ChunkedLoss):
        self.head, self.name, self.settings = head, name, settings

    def __call__(self, hidden: Tensor) -> DeferredLogits:
        # Idefics appends the logits of additional tokens.
        width = self.head.out_features + getattr(self.head, "out_additional_features", 0)
        device = hidden.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        return DeferredLogits(
            Recipe(self.head, self.name, hidden, width, dtype), partial(chunked_cross_entropy, self.settings.items)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


def chunked_cross_entropy(
    items: Tensor | None,
    recipe: Recipe,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORED,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Return the cross-entropy in fp32, from hidden states [rows, d] and targets [rows]; see `F.cross_entropy`.

    `items` is the number by which a sum is going to be divided. Returns None for arguments that are not supported.
    """
    other = weight is not None or label_smoothing or size_average is not None or reduce is not None
    if other or reduction not in ("mean", "sum") or target.shape != recipe.hidden.shape[:-1] or target.ndim != 1:
        return None
    supervised = (target != ignore_index).nonzero().squeeze(1)
    count = len(supervised)
    if not count:  # the first row with a weight of 0, since every process needs gradients
        supervised, target = supervised.new_zeros(1), torch.zeros_like(target)
    if recipe.operations and recipe.operations[-1].to_float32:  # it would copy the logits
        recipe = recipe.without_last()
    inputs = [value for operation in recipe.operations for value in operation.inputs]
    trained = [value for value in (*recipe.head.parameters(), *inputs) if value.requires_grad]
    targets = target[supervised]
    expected = 1 / max(1, count) if reduction == "mean" else 1 if items is None else 1 / items

    def loss_of(rows: Tensor) -> Tensor:
        gradients = torch.is_grad_enabled()
        settings = rows_per_chunk(recipe), float(count > 0), gradients, expected
        return _ChunkedSum.apply(recipe.logits, *settings, targets, rows, *trained)

    total = as_one_call(recipe.head, loss_of, recipe.hidden[supervised])
    return total / count if reduction == "mean" else total


def rows_per_chunk(recipe: Recipe) -> int:
    """Return the number of rows whose logits are computed at once."""
    rows = max(1, CHUNK_BYTES // (4 * recipe.width))
    if any(value.requires_grad for value in recipe.head.parameters(recurse=False)):
        # Each chunk makes a gradient of the size of the head [width, d]; with d rows its logits are as large.
        rows = max(rows, recipe.hidden.shape[-1])
    return rows


class _ChunkedSum(torch.autograd.Function):
    """The sum of cross-entropies over rows, times `weight`.

    The forward pass computes the gradients, for an `expected` gradient of the sum. The backward pass multiplies them by
    the ratio of the true one to it. If both are equal, nothing is rounded more often than in `F.cross_entropy`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[Tensor], Tensor],
        size: int,
        weight: float,
        gradients: bool,
        expected: Tensor | float,
        targets: Tensor,
        rows: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        ctx.expected = expected
        needed = gradients and any(value.requires_grad for value in (rows, *trained))
        losses, row_grads = [], []
        trained_grads: list[Tensor | None] = [None] * len(trained)
        for chunk, target in zip(rows.detach().split(size), targets[:, None].split(size), strict=True):
            with torch.set_grad_enabled(needed):
                chunk = chunk.requires_grad_(rows.requires_grad)
                logits = logits_of(chunk)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            log_p = torch.log_softmax(logits.detach(), dim=-1, dtype=dtype)
            losses.append(log_p.gather(1, target).sum().neg())
            if not needed:
                continue
            if logits.dtype == torch.float16:
                # A power of 2 times what is expected, so that the ratio rounds nothing.
                expected = torch.as_tensor(expected, dtype=dtype, device=log_p.device)
                ctx.expected = expected * torch.exp2(torch.log2(FP16_GRADIENT / expected).round())
            step = weight * torch.as_tensor(ctx.expected, dtype=dtype, device=log_p.device)
            gradient = torch.zeros_like(log_p).scatter_(1, target, -step.expand(target.shape))
            # Autograd calls this for `log_softmax`, too. With `log_p.exp()` the last bit would differ.
            torch.ops.aten._log_softmax_backward_data(gradient, log_p, 1, dtype, out=gradient)
            del log_p
            gradient = gradient.to(logits.dtype)
            wanted = ([chunk] if rows.requires_grad else []) + list(trained)
            found = list(torch.autograd.grad(logits, wanted, gradient, allow_unused=True))
            if rows.requires_grad:
                row_grads.append(found.pop(0))
            trained_grads = [_added(total, new) for total, new in zip(trained_grads, found, strict=True)]
        ctx.gradients = (torch.cat(row_grads) if row_grads else None, *trained_grads)
        return torch.stack(losses).sum() * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss was backpropagated a second time; its gradients are freed after the first")
        factor, (rows, *trained), ctx.gradients = gradient / ctx.expected, ctx.gradients, None
        scaled = [None if value is None else value.mul_(factor) for value in (rows, *trained)]
        return None, None, None, None, None, None, *scaled


def _added(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if total is None else total if new is None else total.add_(new)
