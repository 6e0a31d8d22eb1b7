"""The few things that know about ZeRO-3, where a parameter's `data` is empty until it is gathered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 manages the parameter."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[Tensor], write: bool = False) -> Iterator[None]:
    """Whole parameters inside the block: ZeRO-3 partitions are gathered, everything else is left alone.

    With `write`, what rank 0 changes inside the block is kept; otherwise changes are lost when the block ends.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def read_in_forward(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let ZeRO-3 gather `parameters`, which children of `module` hold, for the forward and backward pass of `module`.

    Marking the module as a ZeRO-3 leaf would gather them too, but a leaf's gradients are reduced at its first backward
    pass, and a vision encoder runs twice where a batch holds pictures and clips.
    """
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def give_back(engine: Any) -> None:
    """Let ZeRO-3 finish what it fetches ahead, and partition all that is gathered.

    After a pass without a backward one, weights that the trace expects next are still under way, and could neither be
    gathered by others nor be relied on.
    """
    if is_partitioned(next(engine.parameters())):
        engine.empty_partition_cache()


def numel(parameter: nn.Parameter) -> int:
    """The parameter's true size; ZeRO-3 leaves `numel()` at 0 while it is partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def true_shape(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's true shape, while it is partitioned too."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def local_shard(parameter: nn.Parameter) -> Tensor:
    """What this process holds of the parameter: all of it, or its ZeRO-3 partition."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes; under ZeRO-3 with offload its parameters lie elsewhere."""
    parameter = next(model.parameters())
    if is_partitioned(parameter) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def any_process(yes: bool) -> bool:
    """Whether any process says yes. A collective: every process calls it."""
    if not torch.distributed.is_initialized():
        return yes
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    flag = torch.tensor(int(yes), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def whole_models() -> Iterator[None]:
    """Models loaded inside the block are whole, though a ZeRO-3 TrainingArguments exists.

    Evaluation needs a model that generates by itself, and adapters read the weights that they are put on; the
    DeepSpeed engine partitions the model when training begins.
    """
    from transformers.integrations import deepspeed as hf

    active = hf._hf_deepspeed_config_weak_ref() if hf._hf_deepspeed_config_weak_ref is not None else None
    hf.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active is not None:
            hf.set_hf_deepspeed_config(active)
