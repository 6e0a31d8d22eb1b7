"""FLOPs of a training step, and model FLOPs utilization (MFU).

A step's FLOPs are the sum over the vision encoder and the rest of 2·N·t (forward) + 2·N·t (gradient of the inputs, if
a trained weight precedes these weights or is among them) + 2·T·t (gradient of the T trained weights), plus 12·L·d·Σl²
for attention (PaLM, arXiv 2204.02311, appendix B; l: tokens of a sample; 4 instead of 12 if no gradient flows). So a
frozen weight costs 4·N·t and a trained one 6·N·t. N counts matrices, without embedding tables. t counts tokens for the
language model and the projector, supervised tokens for the head, since no others go through it, and patches for the
vision encoder, whose attention (a tenth of its FLOPs) is left out. Recomputed activations (gradient checkpointing) and
padding do not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmdora.core.deepspeed import true_shape
from mmdora.models.architectures import ARCHITECTURES, is_inside

# Dense bf16 TFLOP/s from the vendors' data sheets. The first name that is part of the device's name applies.
PEAKS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("MI300X", 1307.4),
    ("MI250X", 383.0),
)


def peak_flops(name: str) -> float | None:
    """Return a device's dense bf16 FLOP/s by its name; None if the device is unknown."""
    return next((tera * 1e12 for part, tera in PEAKS if part in name), None)


def device_peak(device: torch.device) -> float | None:
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class FlopCosts:
    """FLOPs of a step per token, supervised token, patch of an image or frame, and pair of tokens of a sample."""

    per_token: float  # without the head
    per_supervised: float  # of the head
    per_patch: float
    per_pair: float
    patch_values: int  # pixel values per patch

    def flops(self, tokens: float, supervised: float, squares: float, pixels: float) -> float:
        """Return the FLOPs for all and supervised tokens, the sum of squared sample lengths, and the pixel values."""
        text = self.per_token * tokens + self.per_supervised * supervised + self.per_pair * squares
        return text + self.per_patch * pixels / self.patch_values


def flop_costs(model: Any) -> FlopCosts:
    """Count FLOPs from the model's weights, adapters included, and from which of them are trained."""
    parts = ARCHITECTURES[model.config.model_type].parts if model.config.model_type in ARCHITECTURES else {}
    vision, projector = parts.get("vision", ()), parts.get("projector", ())
    sizes = {place: [0.0, 0.0] for place in ("vision", "head", "other")}  # [all weights, trained weights]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    in_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    for name, parameter in model.named_parameters():
        if id(parameter) in tables - in_head or len(true_shape(parameter)) < 2:
            continue
        count = _active(model.config, parameter)
        in_vision, in_projector = (any(is_inside(name, root) for root in roots) for roots in (vision, projector))
        size = sizes["head" if id(parameter) in in_head else "vision" if in_vision and not in_projector else "other"]
        size[0] += count
        size[1] += count * parameter.requires_grad
    flows_in_vision = sizes["vision"][1] > 0
    flows = flows_in_vision or any(parameter.requires_grad for parameter in model.parameters())
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)  # a state-space model has none
    width = heads and heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    return FlopCosts(
        per_token=(4.0 if flows else 2.0) * sizes["other"][0] + 2 * sizes["other"][1],
        per_supervised=(4.0 if flows else 2.0) * sizes["head"][0] + 2 * sizes["head"][1],
        per_patch=(4.0 if flows_in_vision else 2.0) * sizes["vision"][0] + 2 * sizes["vision"][1],
        per_pair=(12.0 if flows else 4.0) * text.num_hidden_layers * width,
        patch_values=_patch_values(model.config),
    )


def _active(config: Any, parameter: nn.Parameter) -> float:
    """Return the number of weights that one token uses: all of them, or the share of routed experts."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None) or true_shape(parameter)
    text = config.get_text_config()
    experts, chosen = getattr(text, "num_experts", None), getattr(text, "num_experts_per_tok", None)
    share = chosen / experts if experts and chosen and len(shape) == 3 and shape[0] == experts else 1.0
    return math.prod(shape) * share


def _patch_values(config: Any) -> int:
    """Return the pixel values per position of the vision encoder: 3 × patch height × width × frames."""
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "patch_size", 14)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return 3 * height * width * int(getattr(vision, "temporal_patch_size", 1) or 1)
