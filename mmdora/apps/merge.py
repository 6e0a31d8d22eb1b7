"""`mmdora merge`: write a plain Hugging Face model and check that it computes the same, or export a plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image
from mmdora.adapters.merging import LoRAExport, export_lora, merge_adapters
from mmdora.apps.load_target import load_target
from mmdora.core.errors import UserError
from mmdora.models.language_models import auto_class, auto_names
from mmdora.models.loading import needs_mmdora, save_card, save_model, to_plain_transformers


@dataclass(frozen=True)
class MergeResult:
    """A merged model on disk, and how its logits differ from those of the model with adapters."""

    out: Path
    dtype: torch.dtype
    max_difference: float  # largest difference of a logit between the adapted model and the reloaded merged model
    logit_range: tuple[float, float]  # smallest and largest logit of the adapted model
    needs_mmdora: bool  # loading it takes `import mmdora.models` first
    auto_names: tuple[str, str]  # the Auto classes that load the model and its processor


def merge_target(
    target: str, out: Path, lora_rank: int | None = None, trust_remote_code: bool = False
) -> MergeResult | LoRAExport:
    """Write the merged model of a run or an adapter to `out`, reload it, and compare it with the adapted model.

    With `lora_rank` write a plain LoRA of that rank in PEFT's layout instead, and return its approximation errors.
    Raises UserError if `out` is not empty or the target cannot be loaded.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new directory")
    loaded = load_target(target, trust_remote_code)
    if lora_rank is not None:
        return export_lora(loaded.model, out, lora_rank)
    encoder = Encoder(loaded.processor, loaded.video)
    probe = encoder.blank() if encoder.text_only else encoder.filler(Image)  # runs every layer
    adapted = _logits(loaded.model, probe)
    model = to_plain_transformers(merge_adapters(loaded.model))
    save_model(model, loaded.processor, out)
    save_card(model, out)
    reloaded = auto_class(model.config).from_pretrained(out, dtype=model.dtype, trust_remote_code=trust_remote_code)
    difference = (_logits(reloaded.to(model.device).eval(), probe) - adapted).abs().max().item()
    return MergeResult(
        out,
        model.dtype,
        difference,
        (adapted.min().item(), adapted.max().item()),
        needs_mmdora(model),
        auto_names(model.config),
    )


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    return model(**{k: v.to(device) for k, v in inputs.items() if k != "labels"}).logits.float().cpu()
