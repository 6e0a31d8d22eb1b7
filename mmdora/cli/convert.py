"""`mmdora convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdora.cli.app import NewModel, app


@app.command()
def convert(
    folder: Annotated[
        Path, typer.Argument(metavar="LLAVA_DIR", help="Checkpoint of LLaVA's own code, or a Llama language model.")
    ],
    out: NewModel,
    vision_tower: Annotated[
        str, typer.Option(help="CLIP model that the checkpoint was trained with: a directory or a hub id.")
    ],
    base: Annotated[
        Path | None, typer.Option(help="Base of a projector or LoRA checkpoint: a language model or a LLaVA model.")
    ] = None,
) -> None:
    """Convert a LLaVA checkpoint to a Hugging Face model.

    Takes checkpoints of LLaVA's own code, and Llama language models, which get a new projector.
    """
    from mmdora.apps.check_paths import check_directory, check_model_path, check_new_directory

    check_new_directory(out)
    check_directory(folder)
    check_model_path("--vision-tower", vision_tower)
    if base is not None:
        check_directory(base)

    from mmdora.conversion.llava import convert_llava
    from mmdora.core.console import make_console
    from mmdora.core.logs import quiet_libraries
    from mmdora.models.loading import save_model

    quiet_libraries()
    console = make_console()
    converted = convert_llava(folder, vision_tower, base)
    save_model(converted.model, converted.processor, out)
    parameters = sum(p.numel() for p in converted.model.parameters())
    console.print(f"{folder}: a {converted.kind}, {parameters:,} parameters in {converted.model.dtype}", soft_wrap=True)
    console.print(f"The vision encoder's weights are from {converted.tower}.", soft_wrap=True)
    console.print(f"{out} loads with AutoModelForImageTextToText and AutoProcessor, without mmdora.", soft_wrap=True)
