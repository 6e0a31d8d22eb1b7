"""`mmdora plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdora.cli.app import Config, Overrides, app

if TYPE_CHECKING:
    from rich.console import Console

    from mmdora.planning.plan_run import RunPlan


@app.command()
def plan(
    config: Config,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, over all nodes.")],
    gpu_memory: Annotated[float, typer.Option(min=0.001, help="Memory of each GPU in GiB.")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of one node. Default: 8.")] = None,
) -> None:
    """Show memory per GPU at each ZeRO stage and offload.

    Exits with 1 if the run fits under none of them.
    """
    from mmdora.core.config_files import load_config
    from mmdora.core.registry import import_plugins

    settings = load_config(config, overrides)

    from mmdora.apps.check_config import check_config

    import_plugins(settings.plugins)
    check_config(settings, needs_data=False)

    from mmdora.core.console import make_console
    from mmdora.core.logs import quiet_libraries
    from mmdora.planning.plan_run import plan_run

    quiet_libraries()
    console = make_console()
    planned = plan_run(settings, gpus, gpu_memory, gpus_per_node)
    console.print(
        f"{planned.parameters:,} parameters, of which {planned.trainable:,} are trained; a micro-batch of "
        f"{planned.micro_batch_size} × {planned.tokens:,} tokens, of which autograd keeps "
        f"{_format_bytes(planned.saved_activations)}",
        soft_wrap=True,
    )
    _show_engines(console, planned)
    _show_recommendation(console, planned)
    raise typer.Exit(int(planned.recommendation is None))


def _format_bytes(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _show_engines(console: Console, planned: RunPlan) -> None:
    from mmdora.core.console import make_table

    unit, name = (2**30, "GiB") if max(row.peak for row in planned.engines) >= 2**30 else (2**20, "MiB")
    title = f"{name} on each of {planned.cluster.gpus} GPUs, with micro_batch_size {planned.micro_batch_size}"
    columns = ("deepspeed", "weights", "grads", "Adam", "buf.", "act.", "peak", "node", "fits")
    table = make_table(title, *columns)
    for row in planned.engines:
        parts = (row.weights, row.gradients, row.optimizer, row.buffers, row.activations, row.peak, row.host)
        cells = [f"{max(0, part) / unit:.1f}" if part else "–" for part in parts]
        table.add_row(Path(row.engine).name, *cells, "yes" if planned.fits(row) else "no")
    console.print(table)
    console.print(
        "buf.: communication buckets and parameters that ZeRO-3 has gathered. act.: activations. "
        "peak: the largest of backward pass, optimizer step and model loading. It does not include the CUDA context, "
        "NCCL buffers and fragmented memory. node: CPU memory of a node with "
        f"{planned.cluster.per_node} of the GPUs.",
        style="dim",
        soft_wrap=True,
    )


def _show_recommendation(console: Console, planned: RunPlan) -> None:
    memory = _format_bytes(planned.cluster.memory)
    best, micro = planned.recommendation, planned.micro_batch_size
    if best is None:
        console.print(
            f"Fits under none, at any micro-batch size. Use more GPUs or GPUs with more than {memory}, a smaller "
            "data.max_length, training.gradient_checkpointing=true, or a smaller model.",
            style="red",
            soft_wrap=True,
        )
        return
    engine = "null" if best.engine == "none" else best.engine
    settings = f"training.deepspeed={engine} training.micro_batch_size={best.micro_batch_size}"
    console.print(f"Fits: {settings} ({_format_bytes(best.peak)} of {memory})", style="green", soft_wrap=True)
    if best.disk:
        console.print(f"Needs {_format_bytes(best.disk)} of local disk on each node.", style="yellow", soft_wrap=True)
    if best.micro_batch_size < micro:
        console.print(f"training.micro_batch_size={micro} does not fit with it.", style="yellow", soft_wrap=True)
