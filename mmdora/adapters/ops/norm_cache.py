"""A cache of DoRA's norms: inside `weights_fixed` each norm is computed once, outside at every forward pass.

‖W + sBA‖ changes only when A or B change, but a tensor does not say reliably that it has changed: DeepSpeed's bf16
optimizers do not increase `Parameter._version`. So norms are cached only inside a scope whose caller guarantees that no
weight changes. The trainer opens it at the start of an optimizer step and closes it before the update. Outside such a
scope nothing is cached, so no norm can be stale.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmdora.adapters.ops.functional import dora_norm, working_dtype

_cached: dict[int, Tensor] | None = None
_keys = itertools.count(1)


def new_key() -> int:
    """Return a new cache key for one adapter on one layer, unique in this process."""
    return next(_keys)


def fix_weights(fixed: bool) -> None:
    """Open a new, empty scope (True) or close it (False). For callbacks, which cannot use a `with` block."""
    global _cached
    _cached = {} if fixed else None


@contextmanager
def weights_fixed() -> Iterator[None]:
    """Cache every norm at its first use inside the block, in which no weight and no adapter may change.

    A block inside another one uses the cache of the outer one, which stays open.
    """
    global _cached
    outer = _cached
    _cached = {} if outer is None else outer
    try:
        yield
    finally:
        _cached = outer


@torch.library.custom_op("mmdora::norm", mutates_args=())
def norm(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float, key: int) -> Tensor:
    """Return ‖W + sBA‖ [..., out] in fp32 (float64 for float64), from the cache if a scope is open.

    `key` identifies the adapter on its layer (`new_key`). A custom operator, since torch.compile could not trace the
    branch on the cache.
    """
    if _cached is None:
        return dora_norm(weight, lora_a, lora_b, scale)
    if key not in _cached:
        _cached[key] = dora_norm(weight, lora_a, lora_b, scale)
    return _cached[key].clone()  # outputs of an operator must not alias each other


@norm.register_fake
def _(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float, key: int) -> Tensor:
    return weight.new_empty(weight.shape[:-1], dtype=working_dtype(weight.dtype))
