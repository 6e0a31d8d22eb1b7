"""Models whose parameters are split over processes as DTensors: by `fully_shard` (FSDP2), or by tensor parallelism.

`fully_shard` makes every parameter a DTensor of which each process holds a part. A module that was given to it is a
unit: its parameters are gathered, as ordinary tensors, while its `forward` runs, and again in the backward pass.
Every function here also takes ordinary models and parameters. This module is imported on its own, since it imports
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdora.core.errors import UserError

# Empty if torch was built without its distributed package.
DTENSOR: tuple[type[Any], ...] = ()
UNIT: tuple[type[Any], ...] = ()  # classes of modules that were given to `fully_shard`
FSDP1: tuple[type[Any], ...] = ()
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    DTENSOR, UNIT, FSDP1 = (DTensor,), (FSDPModule,), (FullyShardedDataParallel,)


def is_split(tensor: Any) -> bool:
    """Return whether the tensor is a DTensor."""
    return isinstance(tensor, DTENSOR)


def is_unit(module: nn.Module) -> bool:
    """Return whether the module was given to `fully_shard`, so that its parameters are gathered when it is called."""
    return isinstance(module, UNIT)


@torch.no_grad()
def whole_tensor(tensor: Any) -> Tensor:
    """Return the whole of a DTensor, on the device of its mesh; other tensors as they are. Every process calls it."""
    if not is_split(tensor):
        return tensor
    device = tensor.device_mesh.device_type
    if tensor.device.type != device:  # CPUOffloadPolicy: the mesh's backend cannot send tensors of the CPU
        tensor = tensor.to(device)
    return tensor.full_tensor()


@contextmanager
def whole_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the modules hold their whole parameters inside the block, to be read. Every process calls it."""
    split = [(m, name, p) for m in modules for name, p in m._parameters.items() if is_split(p)]
    try:
        for module, name, parameter in split:
            module._parameters[name] = nn.Parameter(whole_tensor(parameter), requires_grad=False)
        yield
    finally:
        for module, name, parameter in split:
            module._parameters[name] = parameter


@torch.no_grad()
def copy_whole(parameter: Any, tensor: Tensor) -> None:
    """Copy a whole tensor, which every process has, into a parameter; into a DTensor only this process's part."""
    if not is_split(parameter):
        parameter.copy_(tensor)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    part = distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(part.to_local())


def reshard(model: nn.Module) -> None:
    """Let all units of `fully_shard` hold their sharded parameters again.

    After a forward pass without a backward pass, the outermost unit keeps its gathered parameters: copies in the dtype
    of the unit's MixedPrecisionPolicy, from which changes are lost. Raises UserError for FullyShardedDataParallel.
    """
    for module in model.modules():
        if isinstance(module, FSDP1):
            raise UserError(
                "the model is wrapped in FullyShardedDataParallel, which flattens the adapters' parameters; shard it "
                "with torch.distributed.fsdp.fully_shard instead"
            )
        if isinstance(module, UNIT):
            module.reshard()


def check_not_split(model: nn.Module, function: str, instead: str) -> None:
    """Raise UserError if the model is sharded, or split by tensor parallelism.

    `function` is what cannot be done with such a model; `instead` is what to do if `fully_shard` was called.
    """
    reshard(model)
    if any(is_unit(module) for module in model.modules()):
        raise UserError(f"{function}: the model is sharded by fully_shard already; {instead}")
    for name, parameter in model.named_parameters():
        if is_split(parameter):
            raise UserError(
                f"{function}: {name} is split by tensor parallelism ({placement(parameter)}), which adapters do not "
                "support; load the model without tp_plan and parallelize_module, and shard it with fully_shard or "
                "train it under ZeRO"
            )


def placement(tensor: Any) -> str:
    """Describe how a DTensor is split."""
    return f"{', '.join(map(repr, tensor.placements))} over {tensor.device_mesh.size()} processes"
