"""`mmdora convert`: a checkpoint of LLaVA's own code as a plain Hugging Face model."""

from __future__ import annotations

from pathlib import Path

from mmdora.conversion.llava import convert_llava
from mmdora.core.console import make_console
from mmdora.core.errors import UserError
from mmdora.core.logs import quiet_libraries
from mmdora.models.loading import save_model


def run(folder: Path, out: Path, vision_tower: str, base: Path | None) -> None:
    quiet_libraries()
    console = make_console()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give a new directory")
    converted = convert_llava(folder, vision_tower, base)
    save_model(converted.model, converted.processor, out)
    parameters = sum(p.numel() for p in converted.model.parameters())
    console.print(f"{folder}: a {converted.kind}, {parameters:,} parameters in {converted.model.dtype}", soft_wrap=True)
    console.print(f"the vision encoder's weights are from {converted.tower}", soft_wrap=True)
    console.print(f"{out} loads with AutoModelForImageTextToText and AutoProcessor, without mmdora", soft_wrap=True)
