"""The optimizer's state, whole and by the names of parameters: the same whatever ZeRO stage and number of processes it
comes from, and for whichever it is meant.

Names are `<kind>.<parameter>`. Kinds are the optimizer's own (`exp_avg`, `exp_avg_sq`, `step`), and `master`: the fp32
weights of a parameter that is itself of lower precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdora.core.deepspeed import is_partitioned, shard_of
from mmdora.core.errors import UserError

MASTER, STEP = "master", "step"
Kinds = dict[str, Tensor]  # of one parameter


def state_of(optimizer: Any) -> PlainState | ZeroState:
    """The state behind what the Trainer holds: torch's optimizer, or DeepSpeed's around it."""
    while hasattr(optimizer, "accelerator_state"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    inner = getattr(optimizer, "optimizer", None)
    if inner is None:
        return PlainState(optimizer, {})
    for halves, flats in FLAT.items():
        if hasattr(optimizer, flats):
            return ZeroState(optimizer, inner, getattr(optimizer, halves), getattr(optimizer, flats))
    assert hasattr(optimizer, "fp32_groups"), f"an optimizer of DeepSpeed's that is not known: {type(optimizer)}"
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    masters = {half: full for group in groups for half, full in zip(*group, strict=True)}
    return PlainState(inner, masters)  # stage 0 in half precision


# DeepSpeed's names for groups of parameters, and for the fp32 partition of each that this process updates:
# stage 3, stages 1 and 2, stage 1 in bfloat16.
FLAT = {
    "fp16_groups": "fp32_partitioned_groups_flat",
    "bit16_groups": "single_partition_of_fp32_groups",
    "bf16_groups": "fp32_groups_flat_partition",
}


class PlainState:
    """Of a torch optimizer over whole parameters, or over fp32 copies of them (`masters`)."""

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Mapping[Tensor, Tensor]):
        self.optimizer, self.masters = optimizer, masters

    def read(self, parameter: nn.Parameter) -> Kinds:
        """Empty for a parameter that has had no gradient yet."""
        held = self.masters.get(parameter, parameter)
        found = {kind: torch.as_tensor(value) for kind, value in self.optimizer.state.get(held, {}).items()}
        return found if held is parameter else found | {MASTER: held.detach()}

    @torch.no_grad()
    def write(self, kept: Iterator[tuple[nn.Parameter, Kinds]]) -> None:
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        for parameter, kinds in kept:
            held = self.masters.get(parameter, parameter)
            if MASTER in kinds:
                held.copy_(kinds.pop(MASTER))
            if not kinds:
                continue
            on_device = groups[held].get("fused") or groups[held].get("capturable")
            step = kinds.pop(STEP).to(held.device if on_device else "cpu")
            states = {kind: value.to(held.device, held.dtype) for kind, value in kinds.items()}
            self.optimizer.state[held] = {STEP: step} | states


class ZeroState:
    """Of a DeepSpeed optimizer whose processes each update a partition. Every process makes every call."""

    def __init__(self, zero: Any, inner: torch.optim.Optimizer, groups: list[list[nn.Parameter]], flats: list[Tensor]):
        self.zero, self.optimizer, self.flats = zero, inner, flats
        self.group_of = {parameter: i for i, group in enumerate(groups) for parameter in group}
        self._link()

    def read(self, parameter: nn.Parameter) -> Kinds:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: Kinds = {}
        for kind, value in self.optimizer.state.get(self.flats[self.group_of[parameter]], {}).items():
            if kind == STEP:
                found[STEP] = torch.as_tensor(value).clone()  # one for many parameters, which a file holds by itself
            elif torch.is_tensor(value):
                found[kind] = safe_get_full_optimizer_state(parameter, kind)
        if parameter.dtype != torch.float32:
            found[MASTER] = safe_get_full_fp32_param(parameter)
        return found

    def write(self, kept: Iterator[tuple[nn.Parameter, Kinds]]) -> None:
        """Raises UserError where the state lies on NVMe, which DeepSpeed fills by training alone."""
        if getattr(self.zero, "swap_optimizer", False):
            raise UserError(
                "training.deepspeed: DeepSpeed cannot put a checkpoint's optimizer state on NVMe; go on with "
                "training.deepspeed=zero3_offload"
            )
        steps: dict[int, float] = defaultdict(float)
        for parameter, kinds in kept:
            group = self.group_of[parameter]
            if MASTER in kinds:
                self._set(parameter, kinds.pop(MASTER), None)
            if not kinds:
                continue
            # One counter for a whole group, in which torch's own optimizer skips what had no gradient.
            steps[group] = max(steps[group], float(kinds.pop(STEP)))
            self._make_room(list(kinds))
            for kind, value in kinds.items():
                self._set(parameter, value, kind)
        for group, step in steps.items():
            self.optimizer.state[self.flats[group]][STEP] = torch.tensor(step)

    def _make_room(self, kinds: list[str]) -> None:
        """DeepSpeed's optimizer has no state before its first step."""
        if self.optimizer.state.get(self.flats[0]):
            return
        for flat in self.flats:
            self.optimizer.state[flat] = {STEP: torch.tensor(0.0)} | {kind: torch.zeros_like(flat) for kind in kinds}
        self._link()

    def _link(self) -> None:
        """Stages 1 and 2 find a parameter's state through links, which they make after the first group's first step:
        those of the other groups lead nowhere."""
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, value: Tensor, kind: str | None) -> None:
        """Put this process's share of a whole tensor into its place; `kind` None: the fp32 weights."""
        from deepspeed import utils

        value = value.to(torch.float32)
        if is_partitioned(parameter):  # the whole-tensor call of stage 3 knows no padding
            value = shard_of(parameter, value)
            whole, partial = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        else:
            whole, partial = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        _ = whole(parameter, value) if kind is None else partial(parameter, value, kind)
