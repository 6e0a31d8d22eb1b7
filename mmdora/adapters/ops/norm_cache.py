"""When DoRA's norms are computed: at every forward pass, or once inside `weights_fixed`.

‖W + sBA‖ changes only when A or B do. Nothing on a tensor says reliably that it has changed (DeepSpeed's bf16
optimizers do not move `Parameter._version`), so a norm is kept only where somebody who knows says that nothing will:
the trainer, from the start of an optimizer step to its update. Without a scope nothing is kept, and nothing is stale.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmdora.adapters.ops.functional import dora_norm

_kept: dict[int, Tensor] | None = None
_keys = itertools.count(1)


def new_key() -> int:
    """A number for one adapter on one layer, unique in this process."""
    return next(_keys)


def fix_weights(fixed: bool) -> None:
    """Begin (a new scope, empty) or end keeping norms; for callbacks, which cannot hold a `with` open."""
    global _kept
    _kept = {} if fixed else None


@contextmanager
def weights_fixed() -> Iterator[None]:
    """Inside the block no weight and no adapter may change; every norm is computed once, at its first use."""
    fix_weights(True)
    try:
        yield
    finally:
        fix_weights(False)


@torch.library.custom_op("mmdora::norm", mutates_args=())
def norm(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float, key: int) -> Tensor:
    """‖W + sBA‖ [out] in fp32, of the adapter that `key` stands for. Opaque to torch.compile, which sees no branch."""
    if _kept is None:
        return dora_norm(weight, lora_a, lora_b, scale)
    if key not in _kept:
        _kept[key] = dora_norm(weight, lora_a, lora_b, scale)
    return _kept[key].clone()  # an operator's output may not alias another's


@norm.register_fake
def _(weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scale: float, key: int) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.float32)
