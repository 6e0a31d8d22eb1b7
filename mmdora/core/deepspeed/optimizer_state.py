"""The state of DeepSpeed's engine and optimizers: fp32 master weights, Adam's moments, the loss scale.

A parameter's state maps a kind to a tensor of the parameter's full shape. Kinds are the optimizer's own (`exp_avg`,
`exp_avg_sq`, `step`), and `master`: the fp32 weights of a parameter that is itself of lower precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmdora.core.deepspeed.parameters import is_partitioned, shard_of
from mmdora.core.errors import UserError

MASTER, STEP = "master", "step"
ParameterState = dict[str, Tensor]  # by kind

# DeepSpeed's attributes for groups of parameters, and for the fp32 partition of each group that this process updates:
# stage 3, stages 1 and 2, stage 1 in bfloat16.
FLAT_PARTITIONS = {
    "fp16_groups": "fp32_partitioned_groups_flat",
    "bit16_groups": "single_partition_of_fp32_groups",
    "bf16_groups": "fp32_groups_flat_partition",
}
LOSS_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@torch.no_grad()
def reset_stage_0_optimizer(engine: Any) -> None:
    """Make a half-precision stage 0 engine start as the engines of the other stages do.

    To allocate its state, DeepSpeed has already taken a step with zero gradients. Adam counts that step: bias
    correction would be one step ahead, and the first update 0.74 of what it should be. DeepSpeed does not link the
    fp32 copies to their parameters either, so this sets `fp32_copy` on each parameter.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() or not hasattr(optimizer, "fp32_groups"):
        return
    optimizer.optimizer.state.clear()
    for parameter, copy in stage_0_masters(optimizer).items():
        copy.copy_(parameter)  # that step also applied weight decay
        parameter.fp32_copy = copy  # type: ignore[attr-defined]


def stage_0_masters(optimizer: Any) -> dict[Tensor, Tensor]:
    """Return the fp32 copy of each parameter of DeepSpeed's half-precision stage 0 optimizer."""
    assert hasattr(optimizer, "fp32_groups"), f"unknown DeepSpeed optimizer: {type(optimizer)}"
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {parameter: copy for group in groups for parameter, copy in zip(*group, strict=True)}


def partitioned_state(optimizer: Any) -> PartitionedState | None:
    """Return the state of DeepSpeed's stage 1, 2 or 3 optimizer; None for any other optimizer."""
    for groups, partitions in FLAT_PARTITIONS.items():
        if hasattr(optimizer, partitions):
            return PartitionedState(optimizer, getattr(optimizer, groups), getattr(optimizer, partitions))
    return None


class PartitionedState:
    """The state of a DeepSpeed optimizer of which each process updates a partition. Every process makes every call."""

    def __init__(self, zero: Any, groups: list[list[nn.Parameter]], partitions: list[Tensor]):
        self.zero, self.optimizer, self.partitions = zero, zero.optimizer, partitions
        self.group_of = {parameter: i for i, group in enumerate(groups) for parameter in group}
        self._link()

    def read(self, parameter: nn.Parameter) -> ParameterState:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: ParameterState = {}
        for kind, value in self.optimizer.state.get(self.partitions[self.group_of[parameter]], {}).items():
            if kind == STEP:
                state[STEP] = torch.as_tensor(value).clone()  # shared by the group, and saved once per parameter
            elif torch.is_tensor(value):
                state[kind] = safe_get_full_optimizer_state(parameter, kind)
        if parameter.dtype != torch.float32:
            state[MASTER] = safe_get_full_fp32_param(parameter)
        return state

    def write(self, states: Iterator[tuple[nn.Parameter, ParameterState]]) -> None:
        """Restore the states that `read` returned.

        Raises:
            UserError: the optimizer's state is on NVMe, which DeepSpeed fills only by training.
        """
        if getattr(self.zero, "swap_optimizer", False):
            raise UserError(
                "training.deepspeed: DeepSpeed cannot load a checkpoint's optimizer state to NVMe; resume with "
                "training.deepspeed=zero3_offload"
            )
        steps: dict[int, float] = defaultdict(float)
        for parameter, state in states:
            group = self.group_of[parameter]
            if MASTER in state:
                self._set(parameter, state.pop(MASTER), None)
            if not state:
                continue
            # DeepSpeed has one counter per group; torch's optimizer does not count for parameters without a gradient.
            steps[group] = max(steps[group], float(state.pop(STEP)))
            self._allocate(list(state))
            for kind, value in state.items():
                self._set(parameter, value, kind)
        for group, step in steps.items():
            self.optimizer.state[self.partitions[group]][STEP] = torch.tensor(step)

    def _allocate(self, kinds: list[str]) -> None:
        """Create the state that DeepSpeed's optimizer does not have before its first step."""
        if self.optimizer.state.get(self.partitions[0]):
            return
        for partition in self.partitions:
            zeros = {kind: torch.zeros_like(partition) for kind in kinds}
            self.optimizer.state[partition] = {STEP: torch.tensor(0.0)} | zeros
        self._link()

    def _link(self) -> None:
        """Link parameters to their optimizer state again.

        Stages 1 and 2 make these links after the first step of the first group, so those of the other groups are empty.
        """
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, value: Tensor, kind: str | None) -> None:
        """Write this process's share of a full tensor; `kind=None` writes the fp32 weights."""
        from deepspeed import utils

        value = value.to(torch.float32)
        if is_partitioned(parameter):  # stage 3's function for full tensors does not handle padding
            value = shard_of(parameter, value)
            set_weights, set_state = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        else:
            set_weights, set_state = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        if kind is None:
            set_weights(parameter, value)
        else:
            set_state(parameter, value, kind)


def loss_scaler(optimizer: Any) -> Any | None:
    """Return the float16 loss scaler of a DeepSpeed optimizer; None if it has none."""
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def read_loss_scale(scaler: Any) -> dict[str, Any]:
    """Return the scale, and the counters that this kind of scaler has."""
    counters = {key: getattr(scaler, key) for key in LOSS_SCALER_KEYS if hasattr(scaler, key)}
    return {"scale": float(scaler.cur_scale)} | counters


def write_loss_scale(scaler: Any, saved: dict[str, Any]) -> None:
    """Restore what `read_loss_scale` returned. From torch's scaler (`scale` alone) the counters start anew."""
    for key, value in ({"cur_scale": saved["scale"]} | saved).items():
        if key in LOSS_SCALER_KEYS and hasattr(scaler, key):
            setattr(scaler, key, value)
