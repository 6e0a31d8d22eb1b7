"""The few things that know about ZeRO-3, where a parameter's `data` is empty until it is gathered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Whole parameters inside the block: ZeRO-3 partitions are gathered, everything else is left alone."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def mark_leaf(module: nn.Module) -> None:
    """Let ZeRO-3 gather `module` as one: the parameters of its children are read in its own forward."""
    module._z3_leaf = True  # what deepspeed.utils.set_z3_leaf_module sets; written here so that DeepSpeed stays optional


def numel(parameter: nn.Parameter) -> int:
    """The parameter's true size; ZeRO-3 leaves `numel()` at 0 while it is partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
