"""A frozen language model in 4 or 8 bits (QDoRA), with bitsandbytes; the extra `quant`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmdora.core.errors import UserError
from mmdora.models.architectures import architecture_of


def quantize_language_model(model: nn.Module, bits: str) -> None:
    """Its `nn.Linear` layers in place, as bitsandbytes' (`4bit`: NF4; `8bit`: rows of int8); the vision encoder, the
    projector, embeddings and the output head stay as they are. Raises UserError where that cannot be done."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UserError(f"model.quantization: {bits} needs bitsandbytes: pip install mmdora[quant]") from None
    region = architecture_of(model).resolve(model).get("language")
    if region is None:
        raise UserError(f"model.quantization: it is not known where {type(model).__name__} has its language model")
    for path, parent in list(model.named_modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and region.holds(f"{path}.{name}"):
                setattr(parent, name, _quantized(layer, bits, bnb))


def _quantized(layer: nn.Linear, bits: str, bnb: Any) -> nn.Module:
    # Without storage for the weight, which is replaced.
    with torch.device("meta"):
        if bits == "4bit":
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=layer.weight.dtype, quant_type="nf4"
            )
        else:
            new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    device, weight = layer.weight.device, layer.weight.detach()
    if bits == "4bit":
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        new.support_avx512bf16_for_cpu = False  # else it packs its weight anew when the base model is scored
    else:
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new.to(device).train(layer.training)  # moving it quantizes it
