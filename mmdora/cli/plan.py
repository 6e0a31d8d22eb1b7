"""`mmdora plan`: which engine a run fits under, on so many GPUs of so much memory, before any is paid for."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from data_pipelines.encoding import Encoder
from mmdora.adapters.injection import inject_adapters
from mmdora.core.config_files import load_config
from mmdora.core.console import make_console, make_table
from mmdora.core.errors import UserError
from mmdora.core.logs import quiet_libraries
from mmdora.core.registry import import_plugins
from mmdora.models.loading import load_shape
from mmdora.planning.engine_memory import Memory, half, sizes_of
from mmdora.planning.planner import ActivationMeter, Cluster, Planner, hidden_size, longest, prepare
from mmdora.training.arguments import micro_batches

# The first that fits is advised: each next one sends more around, over slower wires.
ADVISED = ("zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme")
ADVISED_ALONE = ("none", "zero2_offload", "zero3_offload", "zero3_nvme")


def run(name: str, overrides: list[str], gpus: int, gpu_memory: float, per_node: int | None) -> int:
    """Print the plan. Returns 0 where the run fits under some engine, else 1. Raises UserError."""
    config = load_config(name, overrides)
    import_plugins(config.plugins)
    quiet_libraries()
    console = make_console()
    cluster = Cluster(gpus, min(gpus, per_node or 8), gpu_memory * 2**30)
    micro, _ = micro_batches(config.training, gpus)
    if config.model.quantization is not None:
        raise UserError("model.quantization: plan does not know what quantized weights take; leave it out to plan")
    model, processor = load_shape(config.model)
    report = inject_adapters(model, config.parts)
    encoder = Encoder(processor, config.data.video, config.data.max_length, config.data.overlong)
    example = longest(config, encoder)
    sizes = sizes_of(model, hidden_size(model))
    if gpus > 1 or config.training.deepspeed is not None:
        half(model, getattr(torch, config.model.dtype))
    prepare(model, config)
    meter = ActivationMeter(model, config, example)
    planner = Planner(config, sizes, cluster, meter)
    rows = [planner.memory(engine, micro) for engine in planner.engines]
    tokens = example["input_ids"].shape[1]
    console.print(
        f"{report.total:,} parameters, of which {report.trainable:,} are trained; a micro-batch of {micro} × "
        f"{tokens:,} tokens, of which autograd keeps {gib(meter(micro).saved)}",
        soft_wrap=True,
    )
    show(console, planner, rows, micro)
    return advise(console, planner, micro)


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def show(console: Console, planner: Planner, rows: list[Memory], micro: int) -> None:
    unit, name = (2**30, "GiB") if max(row.peak for row in rows) >= 2**30 else (2**20, "MiB")
    cluster = planner.cluster
    title = f"{name} of each of {cluster.gpus} GPUs, with micro-batches of {micro}"
    columns = ("deepspeed", "weights", "grads", "Adam", "buffers", "activ.", "peak", "node", "fits")
    table = make_table(title, *columns)
    for row in rows:
        parts = (row.weights, row.gradients, row.optimizer, row.buffers, row.activations, row.peak, row.host)
        figures = [f"{max(0, part) / unit:.1f}" if part else "–" for part in parts]
        table.add_row(Path(row.engine).name, *figures, "yes" if planner.fits(row) else "no")
    console.print(table)
    console.print(
        "peak: amid the backward pass, in the optimizer's step, or while the whole model is loaded, whichever is most. "
        "Not in it: the CUDA context, NCCL's buffers, what the allocator cannot use again. node: of a node's own "
        f"memory, with {planner.cluster.per_node} of the GPUs.",
        style="dim",
        soft_wrap=True,
    )


def advise(console: Console, planner: Planner, micro: int) -> int:
    """The first engine that fits, and the largest micro-batch under it. Returns the exit code."""
    given = planner.cluster.memory
    for engine in ADVISED_ALONE if planner.cluster.gpus == 1 else ADVISED:
        largest = planner.largest(engine)
        if largest is None:
            continue
        peak = planner.memory(engine, largest).peak
        settings = f"training.deepspeed={'null' if engine == 'none' else engine} training.micro_batch_size={largest}"
        console.print(f"Fits: {settings} ({gib(peak)} of {gib(given)})", style="green", soft_wrap=True)
        if disk := planner.memory(engine, largest).disk:
            console.print(f"It takes {gib(disk)} of a local disk of each node.", style="yellow", soft_wrap=True)
        if largest < micro:
            console.print(f"training.micro_batch_size={micro} does not fit under it.", style="yellow", soft_wrap=True)
        return 0
    console.print(
        f"Fits under none, whatever the micro-batch: more GPUs or a larger one than {gib(given)}; else a smaller "
        "data.max_length, training.gradient_checkpointing=true, or a smaller model.",
        style="red",
        soft_wrap=True,
    )
    return 1
