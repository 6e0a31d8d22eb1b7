"""The optimizer's state by parameter, as full tensors: the same for every ZeRO stage and number of processes.

See core/deepspeed/optimizer_state.py for the kinds of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdora.core.deepspeed.optimizer_state import (
    MASTER,
    STEP,
    ParameterState,
    PartitionedState,
    partitioned_state,
    stage_0_masters,
)


def optimizer_state(optimizer: Any) -> PlainState | PartitionedState:
    """Return the state behind the Trainer's optimizer: torch's optimizer, or DeepSpeed's around it."""
    while hasattr(optimizer, "accelerator_state"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    inner = getattr(optimizer, "optimizer", None)
    if inner is None:
        return PlainState(optimizer, {})
    return partitioned_state(optimizer) or PlainState(inner, stage_0_masters(optimizer))


class PlainState:
    """The state of a torch optimizer over whole parameters, or over fp32 copies of them (`masters`)."""

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Mapping[Tensor, Tensor]):
        self.optimizer, self.masters = optimizer, masters

    def read(self, parameter: nn.Parameter) -> ParameterState:
        """Return the parameter's state; empty if it has had no gradient yet."""
        optimized = self.masters.get(parameter, parameter)
        state = {kind: torch.as_tensor(value) for kind, value in self.optimizer.state.get(optimized, {}).items()}
        return state if optimized is parameter else state | {MASTER: optimized.detach()}

    @torch.no_grad()
    def write(self, states: Iterator[tuple[nn.Parameter, ParameterState]]) -> None:
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        for parameter, state in states:
            optimized = self.masters.get(parameter, parameter)
            if MASTER in state:
                optimized.copy_(state.pop(MASTER))
            if not state:
                continue
            on_device = groups[optimized].get("fused") or groups[optimized].get("capturable")
            step = state.pop(STEP).to(optimized.device if on_device else "cpu")
            moments = {kind: value.to(optimized.device, optimized.dtype) for kind, value in state.items()}
            self.optimizer.state[optimized] = {STEP: step} | moments
