"""What one GPU, and its node, hold under each engine: plain PyTorch, and DeepSpeed by its JSON.

The terms are DeepSpeed 0.19's own allocations (stage_1_and_2.py, stage3.py, partitioned_param_swapper.py). All figures
are bytes. Not in them: the CUDA context, NCCL's buffers, and what the allocator cannot use again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmdora.planning.activations import Activations

FP32 = 4
MOMENTS = 2  # AdamW's
MAX_LIVE = 1_000_000_000  # stage3_max_live_parameters, where a JSON does not say
SUB_GROUP = 1_000_000_000  # sub_group_size: parameters that stage 3 updates at once
SWAP_BUFFERS, SWAP_BUFFER = 5, 100_000_000  # offload_param's buffer_count, and buffer_size in parameters


@dataclass(frozen=True)
class Sizes:
    """Of a model with its adapters, as it is loaded."""

    frozen: int  # bytes, buffers included
    trained: int  # bytes, in the dtype in which they are loaded: adapters in fp32
    trained_parameters: int
    parameters: int
    small: int  # parameters that ZeRO-3 leaves whole on every GPU
    hidden: int  # width of the language model, by which buckets are sized

    @property
    def loaded(self) -> int:
        return self.frozen + self.trained


def sizes_of(model: nn.Module, hidden: int) -> Sizes:
    """Of a model that has its adapters, on any device; nothing is read but shapes."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Sizes(
        frozen=sum(p.nbytes for p in parameters if not p.requires_grad) + sum(b.nbytes for b in model.buffers()),
        trained=sum(p.nbytes for p in trained),
        trained_parameters=sum(p.numel() for p in trained),
        parameters=sum(p.numel() for p in parameters),
        small=sum(p.numel() for p in parameters if p.numel() <= 10 * hidden),
        hidden=hidden,
    )


@dataclass(frozen=True)
class Run:
    """What the engines share: how many processes there are, and how they compute."""

    world: int
    per_node: int  # GPUs
    accumulation: int  # micro-batches a step
    weight: int  # bytes of a weight under DeepSpeed: 2, or 4 in fp32
    before: bool = False  # the base model is scored first: whole on each GPU, under ZeRO-3 too


@dataclass(frozen=True)
class Memory:
    """Of one GPU, in the two moments that may be the worst: amid a backward pass, and in the optimizer's step."""

    engine: str
    weights: int
    gradients: int  # held from one micro-batch to the next
    optimizer: int
    buffers: int  # of communication, and parameters that ZeRO-3 has gathered
    activations: int
    step: int  # temporaries of the optimizer's step
    loading: int  # the whole model, which is on each GPU before an engine takes it apart; ZeRO-3 does so on the CPU
    host: int  # a node's memory
    disk: int  # a node's

    @property
    def states(self) -> int:
        return self.weights + self.optimizer

    @property
    def peak(self) -> int:
        backward = self.buffers + self.activations + self.gradients
        return max(self.loading, self.states + max(backward, self.gradients + self.step))


def plain(sizes: Sizes, run: Run, activations: Activations, name: str = "none") -> Memory:
    """One process without DeepSpeed, or several with torch's DistributedDataParallel, which has buckets of its own.

    What is trained is in fp32 there, and autograd keeps the half-precision copies that autocast makes of full parts.
    """
    trained = FP32 * sizes.trained_parameters
    copies = trained - sizes.trained
    # In the only micro-batch of a step gradients come to be while activations go.
    grows = run.accumulation == 1 and run.world == 1
    return Memory(
        engine=name,
        weights=sizes.frozen + trained,
        gradients=trained,
        optimizer=MOMENTS * trained,
        buffers=trained if run.world > 1 else 0,
        activations=copies + (activations.peak_with_gradients - sizes.trained if grows else activations.peak),
        step=trained,  # the square roots of all second moments at once
        loading=sizes.loaded,
        host=run.per_node * sizes.loaded,
        disk=0,
    )


def deepspeed(sizes: Sizes, run: Run, activations: Activations, name: str, tree: dict[str, Any]) -> Memory:
    """What a DeepSpeed config makes of it."""
    zero = tree.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    shares = run.world if stage else 1
    share = -(-sizes.trained_parameters // shares)
    accumulated = FP32 if tree.get("data_types", {}).get("grad_accum_dtype") == "fp32" else run.weight
    optimizer_away, weights_away = (_away(zero, key) for key in ("offload_optimizer", "offload_param"))
    bucket = _elements(zero, "reduce_bucket_size", 500_000_000, sizes.hidden**2) * run.weight
    whole = sizes.frozen + sizes.trained_parameters * run.weight
    gathered = 0
    if stage == 3:
        persistent = sizes.small * run.weight
        weights = persistent + (0 if weights_away else -(-(whole - persistent) // run.world))
        most = int(zero.get("stage3_max_live_parameters", MAX_LIVE))
        gathered = min(sizes.parameters - sizes.small, most) * run.weight
        updated = min(share, int(zero.get("sub_group_size", SUB_GROUP)))
    else:
        weights, updated = whole, share
        bucket *= 2 if zero.get("overlap_comm") else 1
    gradients = share * accumulated
    if stage < 2:
        gradients += sizes.trained_parameters * run.weight
    states = (1 + MOMENTS) * FP32 * share
    host, disk = _away_bytes(sizes, run, zero, whole, states)
    return Memory(
        engine=name,
        weights=weights,
        gradients=0 if optimizer_away and stage >= 2 else gradients,
        optimizer=0 if optimizer_away else states,
        buffers=bucket + gathered,
        activations=activations.peak,
        step=0 if optimizer_away else 2 * FP32 * updated,  # its gradients in fp32, and the square roots
        loading=sizes.loaded if stage < 3 or run.before else 0,
        host=max(host, run.per_node * sizes.loaded),
        disk=disk,
    )


def _away_bytes(sizes: Sizes, run: Run, zero: dict[str, Any], whole: int, states: int) -> tuple[int, int]:
    """A node's memory and disk for what its GPUs do not hold: states, gradients in fp32, and stage 3's weights."""
    host = disk = 0
    share = states // ((1 + MOMENTS) * FP32)
    match _away(zero, "offload_optimizer"):
        case "cpu":
            host += run.per_node * (states + share * FP32)
        case "nvme":
            disk += run.per_node * (states + share * FP32)
            host += run.per_node * 4 * min(share, SUB_GROUP) * FP32  # what is being updated
    match _away(zero, "offload_param"):
        case "cpu":
            host += run.per_node * -(-whole // run.world)
        case "nvme":
            disk += run.per_node * -(-whole // run.world)
            host += run.per_node * SWAP_BUFFERS * SWAP_BUFFER * run.weight
    return host, disk


def _away(zero: dict[str, Any], key: str) -> str | None:
    device = zero.get(key, {}).get("device", "none")
    return None if device == "none" else device


def _elements(zero: dict[str, Any], key: str, default: int, auto: int) -> int:
    value = zero.get(key, default)
    return auto if value == "auto" else int(value)


def half(model: nn.Module, dtype: torch.dtype) -> None:
    """What DeepSpeed does to a model's parameters before it trains in half precision; its fp32 masters are its own."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
