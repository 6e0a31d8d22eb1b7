"""Memory of one GPU, and of its node, under each engine: plain PyTorch, and DeepSpeed with a JSON config.

The terms follow the allocations of DeepSpeed 0.19 (stage_1_and_2.py, stage3.py, partitioned_param_swapper.py). All
figures are in bytes. They do not include the CUDA context, NCCL's buffers and allocator fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmdora.core.deepspeed import zero_stage
from mmdora.planning.activations import Activations

FP32 = 4
MOMENTS = 2  # AdamW's
MAX_LIVE = 1_000_000_000  # default of stage3_max_live_parameters
SUB_GROUP = 1_000_000_000  # default of sub_group_size: parameters that stage 3 updates at once
SWAP_BUFFERS, SWAP_BUFFER = 5, 100_000_000  # offload_param's buffer_count, and buffer_size in parameters


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a loaded model with its adapters."""

    frozen: int  # bytes, buffers included
    trained: int  # bytes, in the dtype in which they are loaded (adapters: fp32)
    trained_parameters: int
    parameters: int
    small: int  # parameters that ZeRO-3 keeps whole on every GPU
    hidden: int  # hidden size, from which transformers computes the bucket sizes

    @property
    def loaded(self) -> int:
        return self.frozen + self.trained


def model_sizes(model: nn.Module, hidden: int) -> ModelSizes:
    """Return the sizes of a model with its adapters. Only shapes are read, so it may be on the meta device."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return ModelSizes(
        frozen=sum(p.nbytes for p in parameters if not p.requires_grad) + sum(b.nbytes for b in model.buffers()),
        trained=sum(p.nbytes for p in trained),
        trained_parameters=sum(p.numel() for p in trained),
        parameters=sum(p.numel() for p in parameters),
        small=sum(p.numel() for p in parameters if p.numel() <= 10 * hidden),
        hidden=hidden,
    )


@dataclass(frozen=True)
class ParallelSetup:
    """Number of processes, gradient accumulation and precision, which are the same for every engine."""

    world_size: int
    gpus_per_node: int
    accumulation_steps: int
    weight_bytes: int  # per weight under DeepSpeed: 2, or 4 in fp32
    evaluates_base: bool = False  # the base model is evaluated first: whole on each GPU, even under ZeRO-3


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one GPU by purpose. The peak is in the backward pass, in the optimizer step or while loading."""

    engine: str
    weights: int
    gradients: int  # kept from one micro-batch to the next
    optimizer: int
    buffers: int  # communication buckets, and parameters that ZeRO-3 has gathered
    activations: int
    step: int  # temporaries of the optimizer step
    loading: int  # the whole model, which is on each GPU before it is partitioned; ZeRO-3 partitions on the CPU
    host: int  # CPU memory per node
    disk: int  # per node

    @property
    def states(self) -> int:
        return self.weights + self.optimizer

    @property
    def peak(self) -> int:
        backward = self.buffers + self.activations + self.gradients
        return max(self.loading, self.states + max(backward, self.gradients + self.step))


def memory_without_deepspeed(
    sizes: ModelSizes, setup: ParallelSetup, activations: Activations, name: str = "none"
) -> MemoryEstimate:
    """Estimate one process without DeepSpeed, or several with torch's DistributedDataParallel and its buckets.

    Trained weights are in fp32, and autograd keeps the half-precision copies that autocast makes of full parts.
    """
    trained = FP32 * sizes.trained_parameters
    copies = trained - sizes.trained
    # If a step has a single micro-batch, gradients are allocated while activations are freed.
    overlaps = setup.accumulation_steps == 1 and setup.world_size == 1
    return MemoryEstimate(
        engine=name,
        weights=sizes.frozen + trained,
        gradients=trained,
        optimizer=MOMENTS * trained,
        buffers=trained if setup.world_size > 1 else 0,
        activations=copies + (activations.peak_with_gradients - sizes.trained if overlaps else activations.peak),
        step=trained,  # the square roots of all second moments at once
        loading=sizes.loaded,
        host=setup.gpus_per_node * sizes.loaded,
        disk=0,
    )


def memory_with_deepspeed(
    sizes: ModelSizes, setup: ParallelSetup, activations: Activations, name: str, tree: dict[str, Any]
) -> MemoryEstimate:
    """Estimate a run under the DeepSpeed config `tree`."""
    zero, stage = tree.get("zero_optimization", {}), zero_stage(tree)
    shares = setup.world_size if stage else 1
    share = -(-sizes.trained_parameters // shares)
    accumulated = FP32 if tree.get("data_types", {}).get("grad_accum_dtype") == "fp32" else setup.weight_bytes
    offloads_optimizer, offloads_weights = (
        _offload_device(zero, key) for key in ("offload_optimizer", "offload_param")
    )
    bucket = _elements(zero, "reduce_bucket_size", 500_000_000, sizes.hidden**2) * setup.weight_bytes
    whole = sizes.frozen + sizes.trained_parameters * setup.weight_bytes
    gathered = 0
    if stage == 3:
        persistent = sizes.small * setup.weight_bytes
        weights = persistent + (0 if offloads_weights else -(-(whole - persistent) // setup.world_size))
        max_live = int(zero.get("stage3_max_live_parameters", MAX_LIVE))
        gathered = min(sizes.parameters - sizes.small, max_live) * setup.weight_bytes
        updated = min(share, int(zero.get("sub_group_size", SUB_GROUP)))
    else:
        weights, updated = whole, share
        bucket *= 2 if zero.get("overlap_comm") else 1
    gradients = share * accumulated
    if stage < 2:
        gradients += sizes.trained_parameters * setup.weight_bytes
    states = (1 + MOMENTS) * FP32 * share
    host, disk = _offloaded_bytes(setup, zero, whole, states)
    return MemoryEstimate(
        engine=name,
        weights=weights,
        gradients=0 if offloads_optimizer and stage >= 2 else gradients,
        optimizer=0 if offloads_optimizer else states,
        buffers=bucket + gathered,
        activations=activations.peak,
        step=0 if offloads_optimizer else 2 * FP32 * updated,  # gradients in fp32, and square roots of second moments
        loading=sizes.loaded if stage < 3 or setup.evaluates_base else 0,
        host=max(host, setup.gpus_per_node * sizes.loaded),
        disk=disk,
    )


def _offloaded_bytes(setup: ParallelSetup, zero: dict[str, Any], whole: int, states: int) -> tuple[int, int]:
    """Return (CPU memory, disk) per node for offloaded optimizer states, fp32 gradients and stage 3 weights."""
    host = disk = 0
    share = states // ((1 + MOMENTS) * FP32)
    match _offload_device(zero, "offload_optimizer"):
        case "cpu":
            host += setup.gpus_per_node * (states + share * FP32)
        case "nvme":
            disk += setup.gpus_per_node * (states + share * FP32)
            host += setup.gpus_per_node * 4 * min(share, SUB_GROUP) * FP32  # the group that is being updated
    match _offload_device(zero, "offload_param"):
        case "cpu":
            host += setup.gpus_per_node * -(-whole // setup.world_size)
        case "nvme":
            disk += setup.gpus_per_node * -(-whole // setup.world_size)
            host += setup.gpus_per_node * SWAP_BUFFERS * SWAP_BUFFER * setup.weight_bytes
    return host, disk


def _offload_device(zero: dict[str, Any], key: str) -> str | None:
    device = zero.get(key, {}).get("device", "none")
    return None if device == "none" else device


def _elements(zero: dict[str, Any], key: str, default: int, auto: int) -> int:
    value = zero.get(key, default)
    return auto if value == "auto" else int(value)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters as DeepSpeed does before it trains in half precision; it keeps fp32 masters separately."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
