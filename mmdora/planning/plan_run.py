"""Plan a run's memory per GPU under each DeepSpeed config, without reading model weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_pipelines.encoding import Encoder
from mmdora.adapters.injection import inject_adapters
from mmdora.core.config import RunConfig
from mmdora.core.errors import UserError
from mmdora.models.loading import load_shape
from mmdora.planning.engine_memory import MemoryEstimate, cast_parameters, model_sizes
from mmdora.planning.planner import ActivationProfiler, Cluster, Planner, hidden_size, longest_sample, prepare
from mmdora.training.arguments import micro_batches

GPUS_PER_NODE = 8
# The first that fits is recommended. Each next one communicates more, over slower links.
PREFERRED = ("zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme")
PREFERRED_ON_ONE_GPU = ("none", "zero2_offload", "zero3_offload", "zero3_nvme")


@dataclass(frozen=True)
class Recommendation:
    """The preferred engine that fits, with its largest micro-batch. MemoryEstimate is in bytes."""

    engine: str
    micro_batch_size: int
    peak: float
    disk: float


@dataclass(frozen=True)
class RunPlan:
    """MemoryEstimate is in bytes per GPU; `MemoryEstimate.host` and `Recommendation.disk` are per node."""

    cluster: Cluster
    micro_batch_size: int  # that of the config, or the share of batch_size that a GPU has
    parameters: int
    trainable: int
    tokens: int  # of each sample of the micro-batch
    saved_activations: float  # what autograd keeps of a micro-batch
    engines: list[MemoryEstimate]
    recommendation: Recommendation | None

    def fits(self, memory: MemoryEstimate) -> bool:
        return memory.peak <= self.cluster.memory


def plan_run(config: RunConfig, gpus: int, gpu_memory: float, gpus_per_node: int | None = None) -> RunPlan:
    """Plan a run on `gpus` GPUs of `gpu_memory` GiB each. Raises UserError."""
    if config.model.quantization is not None:
        raise UserError("model.quantization: plan does not support quantized weights; set it to null to plan")
    cluster = Cluster(gpus, min(gpus, gpus_per_node or GPUS_PER_NODE), gpu_memory * 2**30)
    micro, _ = micro_batches(config.training, gpus)
    model, processor = load_shape(config.model)
    report = inject_adapters(model, config.parts)
    encoder = Encoder(processor, config.data.video, config.data.max_length, config.data.overlong)
    example = longest_sample(config, encoder)
    sizes = model_sizes(model, hidden_size(model))
    if gpus > 1 or config.training.deepspeed is not None:
        cast_parameters(model, getattr(torch, config.model.dtype))
    prepare(model, config)
    meter = ActivationProfiler(model, config, example, encoder.layout)
    planner = Planner(config, sizes, cluster, meter)
    return RunPlan(
        cluster=cluster,
        micro_batch_size=micro,
        parameters=report.total,
        trainable=report.trainable,
        tokens=example["input_ids"].shape[1],
        saved_activations=meter(micro).saved,
        engines=[planner.memory(engine, micro) for engine in planner.engines],
        recommendation=_recommend(planner),
    )


def _recommend(planner: Planner) -> Recommendation | None:
    for engine in PREFERRED if planner.cluster.gpus > 1 else PREFERRED_ON_ONE_GPU:
        largest = planner.largest(engine)
        if largest is not None:
            memory = planner.memory(engine, largest)
            return Recommendation(engine, largest, memory.peak, memory.disk)
    return None
