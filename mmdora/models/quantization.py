"""Quantize a frozen language model to 4 or 8 bits (QDoRA) with bitsandbytes, which the extra `quant` installs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmdora.core.errors import UserError
from mmdora.models.architectures import architecture_of

ORIGINAL_DTYPE = "original_dtype_of_weight"  # attribute of a quantized layer


def quantize_language_model(model: nn.Module, bits: str) -> None:
    """Replace the `nn.Linear` layers of the language model by bitsandbytes layers, in place.

    `bits` is `4bit` (NF4) or `8bit` (row-wise int8). The vision encoder, the projector, the embeddings and the output
    head keep their dtype. Raises UserError if bitsandbytes is missing or the model has no part `language`.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UserError(f"model.quantization: {bits} needs bitsandbytes; install mmdora's extra 'quant'") from None
    region = architecture_of(model).resolve(model).get("language")
    if region is None:
        raise UserError(f"model.quantization: {type(model).__name__} has no known part 'language' to quantize")
    for path, parent in list(model.named_modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and region.holds(f"{path}.{name}"):
                setattr(parent, name, _quantized(layer, bits, bnb))


def _quantized(layer: nn.Linear, bits: str, bnb: Any) -> nn.Module:
    with torch.device("meta"):  # the weight is replaced below
        if bits == "4bit":
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=layer.weight.dtype, quant_type="nf4"
            )
        else:
            new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    device, weight = layer.weight.device, layer.weight.detach()
    if bits == "4bit":
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        new.support_avx512bf16_for_cpu = False  # otherwise it repacks its weight when the base model is evaluated
    else:
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    setattr(new, ORIGINAL_DTYPE, weight.dtype)
    return new.to(device).train(layer.training)  # `.to` quantizes the weight
