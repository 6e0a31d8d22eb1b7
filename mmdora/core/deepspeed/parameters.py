"""Parameters under ZeRO-3, where `parameter.data` is empty until the parameter is gathered.

Every function also takes ordinary parameters. torch and DeepSpeed are imported inside the functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 manages the parameter."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[Tensor], write: bool = False) -> Iterator[None]:
    """Gather ZeRO-3 partitions inside the block; ordinary parameters stay as they are. Every process calls it.

    With `write=True`, rank 0's changes inside the block are kept. Otherwise changes are lost at the end of the block.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def partition_model(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Partition a whole model on the CPU parameter by parameter, cast to `dtype`, as ZeRO-3 trains it.

    Otherwise DeepSpeed first moves the whole model to the GPU, where it may not fit. Every process calls it.
    """
    import deepspeed
    import torch
    from transformers.integrations.deepspeed import deepspeed_config

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        deepspeed.init_distributed()  # otherwise DeepSpeed's config assumes a single process
        config = deepspeed_config()
        offload = config["zero_optimization"].get("offload_param") or {}
        deepspeed.zero.Init(
            module=model,
            config_dict_or_path=config,
            dtype=dtype,
            remote_device=offload.get("device"),
            pin_memory=offload.get("pin_memory", False) and torch.cuda.is_available(),
        )


def gather_in_forward(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Have ZeRO-3 gather the children's `parameters` for the forward and backward pass of `module`.

    Marking the module as a ZeRO-3 leaf would gather them too. But a leaf's gradients are reduced at its first backward
    pass, and a vision encoder runs twice when a batch holds images and videos.
    """
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def as_one_call(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)`, which may call `module` any number of times, as one forward pass of it to ZeRO-3.

    So ZeRO-3 gathers the module's weights once, and its trace does not depend on the number of calls.
    """
    modules = list(module.modules())
    if not any(is_partitioned(p) for p in module.parameters()):
        return function(x)
    before = [(m._forward_pre_hooks, m._forward_hooks) for m in modules]
    forward = module.__dict__.get("forward")

    def put_hooks(partitioning: bool | None) -> None:
        """Keep ZeRO-3's hooks (True), the other hooks (False) or all (None)."""
        for m, all_hooks in zip(modules, before, strict=True):
            m._forward_pre_hooks, m._forward_hooks = (
                hooks if partitioning is None else _hooks(hooks, partitioning) for hooks in all_hooks
            )

    def put_forward(own: Any) -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    def call(x: Tensor) -> Tensor:
        put_forward(forward)
        put_hooks(False)
        try:
            return function(x)
        finally:
            put_hooks(True)

    try:
        put_hooks(True)
        put_forward(call)
        return module(x)
    finally:
        put_forward(forward)
        put_hooks(None)


def _hooks(hooks: Any, partitioning: bool) -> Any:
    """Return only the hooks of ZeRO-3, or only the others."""
    kept = {key: hook for key, hook in hooks.items() if hook.__module__.startswith("deepspeed.") == partitioning}
    return type(hooks)(kept)


def release_gathered(engine: Any) -> None:
    """Have ZeRO-3 finish prefetching and partition everything that is gathered.

    After a forward pass without a backward pass, weights that the trace expects next are still being fetched. They
    could neither be gathered by others nor be relied on.
    """
    if is_partitioned(next(engine.parameters())):
        engine.empty_partition_cache()


def numel(parameter: nn.Parameter) -> int:
    """Return the parameter's true size; `parameter.numel()` is 0 while ZeRO-3 has it partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def true_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the tensor's true shape, also while ZeRO-3 has it partitioned."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def local_shard(parameter: Tensor) -> Tensor:
    """Return what this process holds of the parameter: its flat ZeRO-3 partition, or the whole parameter."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def is_in_memory(parameter: Tensor) -> bool:
    """Return whether `local_shard` is in memory. It is not if ZeRO-3 offloads parameters to NVMe."""
    return not is_partitioned(parameter) or local_shard(parameter).numel() > 0


def shard_of(parameter: Tensor, full: Tensor) -> Tensor:
    """Return this process's shard of a full tensor of the parameter's shape; `full` itself without ZeRO-3."""
    import torch

    if not is_partitioned(parameter):
        return full
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    share, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(group)  # type: ignore[attr-defined]
    padded = full.new_zeros(share * torch.distributed.get_world_size(group))
    padded[: full.numel()] = full.flatten()
    return padded[share * rank : share * (rank + 1)]


def gather_shards(parameter: Tensor, shard: Tensor) -> Tensor:
    """Return the full tensor of all processes' shards, the inverse of `shard_of`. Every process calls it."""
    import torch

    if not is_partitioned(parameter):
        return shard
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    shards = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shards, shard.contiguous(), group=group)
    shape = true_shape(parameter)
    return torch.cat(shards)[: math.prod(shape)].view(shape)


def full_parameter(parameter: Tensor) -> Tensor:
    """Return a copy of the whole parameter, from its fp32 copy if DeepSpeed trains it in half precision.

    Many small updates are visible only in the fp32 copy. `average` is set by `training.ema` (training/ema.py), and
    `fp32_copy` by `reset_stage_0_optimizer`. Every process calls it.
    """
    if (average := getattr(parameter, "average", None)) is not None:
        return gather_shards(parameter, average).clone()
    if (copy := getattr(parameter, "fp32_copy", None)) is not None:
        return copy.detach().clone()
    if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        if (copy := safe_get_full_fp32_param(parameter)) is not None:
            return copy.detach().clone()
    with gathered([parameter]):
        return parameter.detach().clone()


def compute_device(model: nn.Module) -> torch.device:
    """Return the device on which the model computes; under ZeRO-3 offload its parameters are elsewhere."""
    import torch

    parameter = next(model.parameters())
    if is_partitioned(parameter) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device
