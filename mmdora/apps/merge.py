"""`mmdora merge`: a plain Hugging Face model from a run, with the proof that it computes the same; or a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image
from mmdora.adapters.merging import export_lora, merge_adapters
from mmdora.apps.load_target import load_target
from mmdora.core.console import make_console
from mmdora.core.errors import UserError
from mmdora.core.logs import quiet_libraries
from mmdora.models.loading import needs_mmdora, save_model, to_plain_transformers


def run(target: str, out: Path, lora_rank: int | None, trust_remote_code: bool) -> None:
    quiet_libraries()
    console = make_console()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new directory")
    loaded = load_target(target, trust_remote_code)
    if lora_rank is not None:
        export = export_lora(loaded.model, out, lora_rank)
        worst = max(export.errors, key=lambda path: export.errors[path])
        console.print(f"{out}: a plain LoRA of rank {lora_rank}, in PEFT's layout", soft_wrap=True)
        console.print(f"it misses {export.error:.1%} of the change to the weights (Frobenius norm)")
        console.print(f"most in {worst}: {export.errors[worst]:.1%}", soft_wrap=True)
        return
    encoder = Encoder(loaded.processor, loaded.video)
    probe = encoder.filler(Image)  # a blank picture and a word: enough to run every layer
    adapted = _logits(loaded.model, probe)
    model = to_plain_transformers(merge_adapters(loaded.model))
    save_model(model, loaded.processor, out)
    again = AutoModelForImageTextToText.from_pretrained(out, dtype=model.dtype, trust_remote_code=trust_remote_code)
    difference = (_logits(again.to(model.device).eval(), probe) - adapted).abs().max().item()
    console.print(f"adapter against merged and reloaded: largest logit difference {difference:.2e}")
    console.print(f"(logits from {adapted.min().item():.1f} to {adapted.max().item():.1f}, {model.dtype})")
    how = "after `import mmdora`" if needs_mmdora(model) else "without mmdora"
    console.print(f"{out} loads with AutoModelForImageTextToText and AutoProcessor, {how}", soft_wrap=True)


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    return model(**{k: v.to(device) for k, v in inputs.items() if k != "labels"}).logits.float().cpu()
