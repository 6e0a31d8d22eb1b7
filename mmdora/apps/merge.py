"""`mmdora merge`: write a plain Hugging Face model and check that it computes the same, or export a plain LoRA."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import PreTrainedModel

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, SampleError, Text, Video
from mmdora.adapters.layers.wrapping import dequantize
from mmdora.adapters.merging import LoRAExport, export_lora, merge_adapters
from mmdora.apps.load_target import load_target
from mmdora.core.errors import RunError, UserError
from mmdora.models.language_models import auto_class, auto_names
from mmdora.models.loading import FAILED_MERGE, needs_mmdora, save_card, save_model, to_plain_transformers
from mmdora.models.loading_errors import LOADING_ERRORS, why

# Largest difference between two logits, relative to the largest logit, that is accepted as rounding in a dtype.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
# A larger difference is accepted up to this multiple of what the last bit of every weight changes: in some models a
# rounded number decides, for example, which expert computes a token.
ROUNDING_MARGIN = 4.0
LOADING_PROBLEMS = {"missing_keys": "missing", "unexpected_keys": "not used", "mismatched_keys": "of another shape"}
MASKED = -6e4  # some models give tokens that they never generate the smallest number of their dtype as logit


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

    `out` holds a file `MERGE_FAILED.txt` until the comparison has succeeded.

    Raises:
        UserError: If `out` is not empty or the target cannot be loaded.
        RunError: If the merged model is not the adapted model: weights are missing or differ once it is reloaded, or
            its logits differ by more than the tolerance of its dtype.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new directory")
    loaded = load_target(target, trust_remote_code)
    if lora_rank is not None:
        return export_lora(loaded.model, out, lora_rank)
    dequantize(loaded.model)  # an 8-bit layer without an adapter computes less exactly than its weight allows
    probe = _probe(Encoder(loaded.processor, loaded.video))
    adapted = _logits(loaded.model, probe)
    model = to_plain_transformers(merge_adapters(loaded.model))
    out.mkdir(parents=True, exist_ok=True)
    marker = out / FAILED_MERGE
    marker.write_text("The merge did not finish. Do not use this model.\n", encoding="utf-8")
    save_model(model, loaded.processor, out)
    result, problems = _compare(model, adapted, probe, out, trust_remote_code)
    if problems:
        problem = "; ".join(problems)
        marker.write_text(f"The merge failed: {problem}\n", encoding="utf-8")
        (out / "README.md").write_text(f"# The merge failed. Do not use this model.\n\n{problem}\n", encoding="utf-8")
        raise RunError(f"{out}: the merge failed, and the directory is marked by {FAILED_MERGE}: {problem}")
    assert result is not None
    save_card(model, out)
    marker.unlink()
    return result


def _compare(
    model: PreTrainedModel, adapted: Tensor, probe: dict[str, Tensor], out: Path, trust_remote_code: bool
) -> tuple[MergeResult | None, list[str]]:
    """Reload the merged model and compare it with the one in memory, and with the logits of the adapted model.

    Returns the result, None if it cannot be reloaded, and everything that is wrong with it.
    """
    try:
        reloaded, info = auto_class(model.config).from_pretrained(
            out,
            dtype=model.dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
        )
    except LOADING_ERRORS as error:
        return None, [f"it cannot be loaded again: {why(error, str(out))}"]
    problems = [
        f"{len(info[kind])} weights are {text} when it is loaded again, first {min(map(str, info[kind]))}"
        for kind, text in LOADING_PROBLEMS.items()
        if info[kind]
    ]
    if differing := _differing_weights(model, reloaded):
        problems.append(f"{len(differing)} weights are not those that were saved, first {differing[0]}")
    reloaded = reloaded.to(model.device).eval()
    logits = _logits(reloaded, probe)
    real = (adapted > MASKED) | (logits > MASKED)
    difference, scale = _largest(logits - adapted, real), _largest(adapted, real)
    low, high = adapted[real].min().item(), adapted[real].max().item()
    tolerance = TOLERANCES[model.dtype] * scale
    if not difference <= tolerance:  # NaN too
        tolerance = max(tolerance, ROUNDING_MARGIN * _largest(_with_last_bits_changed(reloaded, probe) - logits, real))
    if not difference <= tolerance:
        problems.insert(
            0,
            f"adapter against merged and reloaded: largest logit difference {difference:.2e}, over the tolerance "
            f"{tolerance:.2e} for logits from {low:.1f} to {high:.1f} in {model.dtype}",
        )
    names = auto_names(model.config)
    return MergeResult(out, model.dtype, difference, (low, high), needs_mmdora(model), names), problems


def _largest(values: Tensor, where: Tensor) -> float:
    return values[where].abs().max().item()


@torch.no_grad()
def _with_last_bits_changed(model: PreTrainedModel, probe: dict[str, Tensor]) -> Tensor:
    """Return the logits after changing every weight by about one unit in the last place, up or down, in place."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_((1 + sign * torch.finfo(parameter.dtype).eps).to(parameter))
    return _logits(model, probe)


def _differing_weights(model: PreTrainedModel, reloaded: PreTrainedModel) -> list[str]:
    """Return the names of weights that are not the same in the reloaded model, apart from their dtype."""
    again = reloaded.state_dict()
    return [
        name
        for name, tensor in model.state_dict().items()
        if name in again and not torch.equal(tensor.to("cpu", again[name].dtype), again[name].cpu())
    ]


def _probe(encoder: Encoder) -> dict[str, Tensor]:
    """Return an encoded prompt that runs every part of the model: text with an image, a video, or nothing else."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(noise).save(buffer, "png")
    image = Image(Path("noise.png"), buffer.getvalue())
    question = Text("What is shown here? Describe it in 10 words.")
    try:
        return encoder.encode_prompt(Sample("probe", (Message("user", (image, question)),), "merge"))
    except SampleError:  # the processor does not accept images
        pass
    try:
        return encoder.filler(Video)
    except SampleError:
        return encoder.encode_prompt(Sample("probe", (Message("user", (question,)),), "merge"))


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    moved = {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # diffusion models draw noise
        return model(**{key: value for key, value in moved.items() if key != "labels"}).logits.float().cpu()
