"""The few things that know about ZeRO-3, where a parameter's `data` is empty until it is gathered."""

from __future__ import annotations

import math
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


@torch.no_grad()
def partition(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Split a whole model on the CPU among the processes, parameter by parameter, as ZeRO-3 trains it in `dtype`.

    Left to itself, DeepSpeed first moves all of it to the GPU, which it need not fit on. Every process calls it.
    """
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    deepspeed.init_distributed()  # else its config takes this process for the only one
    config = deepspeed_config()
    offload = config["zero_optimization"].get("offload_param") or {}
    deepspeed.zero.Init(
        module=model,
        config_dict_or_path=config,
        dtype=dtype,
        remote_device=offload.get("device"),
        pin_memory=offload.get("pin_memory", False) and torch.cuda.is_available(),
    )


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


def local_shard(parameter: Tensor) -> Tensor:
    """What this process holds of the parameter: all of it, or its ZeRO-3 partition."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def is_at_hand(parameter: Tensor) -> bool:
    """Whether `local_shard` is in memory; what ZeRO-3 keeps on NVMe is not."""
    return not is_partitioned(parameter) or local_shard(parameter).numel() > 0


def shard_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """What this process holds of a whole tensor that belongs to the parameter: all of it, or its share under ZeRO-3."""
    if not is_partitioned(parameter):
        return whole
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    share, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(group)  # type: ignore[attr-defined]
    padded = whole.new_zeros(share * torch.distributed.get_world_size(group))
    padded[: whole.numel()] = whole.flatten()
    return padded[share * rank : share * (rank + 1)]


def whole_of(parameter: Tensor, shard: Tensor) -> Tensor:
    """The whole tensor of the processes' shards. A collective under ZeRO-3: every process calls it."""
    if not is_partitioned(parameter):
        return shard
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    shards = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shards, shard.contiguous(), group=group)
    shape = true_shape(parameter)
    return torch.cat(shards)[: math.prod(shape)].view(shape)


def in_full(parameter: Tensor) -> Tensor:
    """The whole parameter, in fp32 where DeepSpeed trains it in half precision and moves a copy in fp32: what it has
    learnt in many small steps is in the copy alone. Every process calls it. See also training/average.py."""
    if (average := getattr(parameter, "average", None)) is not None:
        return whole_of(parameter, average).clone()
    if (copy := getattr(parameter, "fp32_copy", None)) is not None:
        return copy.detach().clone()
    if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        if (copy := safe_get_full_fp32_param(parameter)) is not None:
            return copy.detach().clone()
    with gathered([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def begin_stage_0(engine: Any) -> None:
    """Make a half-precision DeepSpeed engine of stage 0 begin as those of the other stages do.

    To have its state allocated, it has already taken a step, with gradients of zero. Adam counts it: bias correction
    would be one step ahead, and the first update 0.74 of what it should be. Its fp32 copies are known to itself alone.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() or not hasattr(optimizer, "fp32_groups"):
        return
    optimizer.optimizer.state.clear()
    for halves, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for half, copy in zip(halves, copies, strict=True):
            copy.copy_(half)  # weight decay has been at it
            half.fp32_copy = copy


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes; under ZeRO-3 with offload its parameters lie elsewhere."""
    parameter = next(model.parameters())
    if is_partitioned(parameter) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


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
