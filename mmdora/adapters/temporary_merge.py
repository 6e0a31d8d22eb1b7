"""Merge adapters into the weights while a model generates, and restore the original weights afterwards.

A layer with an adapter multiplies by A and B for every generated token, and computes DoRA's norm ‖W + sBA‖ again. With
W' in place of its weight it is a plain layer, and generation takes as long as without an adapter.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from mmdora.adapters import AdapterLayer, adapter_layers
from mmdora.adapters.ops.norm_cache import weights_fixed
from mmdora.core.deepspeed import is_partitioned, numel
from mmdora.core.distributed import local_world_size
from mmdora.core.host_memory import available_memory
from mmdora.models.model_state import state_of

log = logging.getLogger(__name__)

MERGED = "merged"
SEPARATE = "separate"
GIB = 2**30


@contextmanager
def merged_weights(model: nn.Module, memory: float | None = None) -> Iterator[str | None]:
    """Compute with the active adapters merged into the weights inside the block; meant for generation.

    The weights are those that `merge_adapters` makes, so they are rounded to the model's dtype: in bfloat16 the outputs
    are those of the merged model, and differ by rounding from those of the adapter. After the block the original
    weights are back, bit for bit, also if it raises an error. Inside it no gradient is computed, dropout of adapters
    does not apply, and adapters cannot be changed, switched, merged again or saved. Blocks nest.

    The original weights stay in host memory meanwhile. Adapters remain separate, and only their norms are computed once
    for the whole block, if the originals do not fit, if the rows of a batch use different adapters (`adapters_by_row`),
    or if an adapted weight is quantized, partitioned or offloaded.

    Args:
        memory: Most host memory for the original weights, in GiB; 0 never merges. By default half of the memory that
            is available, divided by the number of processes on this machine.

    Yields:
        For receipts: `merged`, or `separate` and the reason. None if no adapter is active.
    """
    state, layers = state_of(model), dict(_computing_layers(model))
    replaced: list[_Replaced] = []
    with torch.no_grad():
        if state.holds_merged or not layers:
            yield MERGED if state.holds_merged else None
            return
        reason = _obstacle(layers, memory)
        try:
            if reason is None:
                reason = _merge_all(model, layers, replaced)
            state.holds_merged = reason is None
            with nullcontext() if reason is None else weights_fixed():
                yield MERGED if reason is None else f"{SEPARATE}: {reason}"
        finally:
            state.holds_merged = False
            _restore(replaced)


@dataclass(frozen=True)
class _Replaced:
    """What is needed to restore a layer whose weight is W' now."""

    layer: AdapterLayer
    name: str  # of its active adapter
    weight: nn.Parameter  # the original parameter, which holds W' now if `content` is not None
    content: Tensor | None  # its original content, on the CPU

    def restore(self) -> None:
        """May be called again if it was interrupted."""
        if self.content is not None:
            self.weight.data.copy_(self.content)
        module, parameter = self.layer.weight_holder
        module._parameters[parameter] = self.weight
        self.layer.active = self.name


def _computing_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Yield the layers whose output depends on an adapter."""
    for path, layer in adapter_layers(model):
        if layer.row_adapters is not None or layer.active is not None:
            yield path, layer


def _obstacle(layers: dict[str, AdapterLayer], memory: float | None) -> str | None:
    """Return why these layers cannot be merged for a while; None if they can."""
    for path, layer in layers.items():
        weight = layer.weight
        if layer.row_adapters is not None:
            return "the rows of a batch use different adapters"
        if is_partitioned(weight):
            return "ZeRO-3 partitions the weights"
        if type(weight.data) is not Tensor:
            return f"the weight of {path} is a {type(weight.data).__name__}"
        if not weight.is_floating_point() or weight.element_size() < 2:
            return f"the weight of {path} is quantized"
        if weight.is_meta:
            return f"the weight of {path} is offloaded"
    needed = sum(numel(layer.weight) * layer.weight.element_size() for layer in layers.values())
    limit = available_memory() / (2 * local_world_size()) if memory is None else memory * GIB
    if needed <= limit:
        return None
    reason = f"a copy of the adapted weights takes {needed / GIB:.3g} GiB of host memory; {limit / GIB:.3g} GiB are "
    reason += "half of this process's share of what is available" if memory is None else "allowed"
    log.warning("generating without merging the adapter, which is slower: %s", reason)
    return reason


def _merge_all(model: nn.Module, layers: dict[str, AdapterLayer], replaced: list[_Replaced]) -> str | None:
    """Give every layer W' as its weight, and disable its adapter. Appends to `replaced` before each change.

    Returns None, or the reason why the layers have their original weights again.
    """
    owners = _owners(model)
    try:
        for layer in layers.values():
            _merge(layer, owners[_storage(layer.weight)] > 1, replaced)
    except torch.OutOfMemoryError:
        _restore(replaced)
        reason = f"{layer.weight.device} has no memory left to merge the adapter"
        log.warning("generating without merging the adapter, which is slower: %s", reason)
        return reason
    return None


def _merge(layer: AdapterLayer, tied: bool, replaced: list[_Replaced]) -> None:
    assert layer.active is not None
    merged, weight = layer.merged_weight(layer.active), layer.weight
    module, parameter = layer.weight_holder
    # A weight that another module uses too must not change there.
    apart = tied or weight.is_inference()
    content = None if apart else weight.detach().to("cpu", copy=True)
    replaced.append(_Replaced(layer, layer.active, weight, content))
    if apart:
        module._parameters[parameter] = nn.Parameter(merged, requires_grad=False)
    else:
        weight.data.copy_(merged)
    layer.active = None


def _restore(replaced: list[_Replaced]) -> None:
    """Restore all layers and empty the list, also while Ctrl-C is pressed."""
    interrupted: KeyboardInterrupt | None = None
    while replaced:
        try:
            replaced[-1].restore()
            replaced.pop()
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _owners(model: nn.Module) -> Counter[int]:
    """Return how many attributes of the model's modules use each storage: more than one for tied weights."""
    tensors = (chain(module._parameters.values(), module._buffers.values()) for module in model.modules())
    return Counter(_storage(tensor) for tensor in chain.from_iterable(tensors) if tensor is not None)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if type(tensor.data) is Tensor else 0
