"""Adapters on a frozen base quantized to 4 or 8 bits by bitsandbytes (QDoRA). Needs the extra `quant`.

The weight is dequantized to a full matrix in the forward pass and again in the backward pass, and freed right after.
8-bit layers multiply by that matrix too, which is more exact than bitsandbytes' own product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from mmdora.adapters.layers.base import AdapterLayer
from mmdora.adapters.layers.linear import AdaptedLinear
from mmdora.models.quantization import ORIGINAL_DTYPE


class QuantizedLinear(AdaptedLinear):
    @property
    def original_dtype(self) -> torch.dtype:
        """The dtype of the weight before it was quantized, which 8-bit layers do not keep by themselves."""
        return getattr(self, ORIGINAL_DTYPE, None) or self.matrix().dtype

    def merge(self, name: str) -> None:
        """Become an `nn.Linear` with the merged weight."""
        self._become_linear(self.merged(name))

    def dequantize(self) -> None:
        """Become an `nn.Linear` with the dequantized weight, without adapters."""
        self._become_linear(self.matrix())

    def _become_linear(self, weight: Tensor) -> None:
        """Take the dtype of the bias if there is one, and otherwise that of the weight before it was quantized."""
        if self.shared_input is not None:
            self.shared_input.dissolve()
        dtype = self.original_dtype if self.bias is None else self.bias.dtype
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        plain.bias = self.bias
        plain.train(self.training)
        self.__class__, self.__dict__ = nn.Linear, plain.__dict__  # type: ignore[assignment]


class AdaptedLinear4bit(QuantizedLinear, bnb.nn.Linear4bit):
    def adopt(self) -> None:
        super().adopt()
        # On some CPUs bitsandbytes repacks the weight at the first forward pass without gradients, and dequantizing it
        # then gives wrong values. After inference mode, autograd would also reject the new tensor.
        self.support_avx512bf16_for_cpu = False
        weight = self.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            unpack = bnb.functional._convert_weight_packed_for_cpu_inverse
            data, weight.quant_state = unpack(weight.data, weight.quant_state)
            weight.data = data.clone()

    @property
    def read(self) -> Callable[[Tensor], Tensor]:
        return partial(_from_4bit, state=self.weight.quant_state)


class AdaptedLinear8bit(QuantizedLinear, bnb.nn.Linear8bitLt):
    state: Any

    @property
    def read(self) -> Callable[[Tensor], Tensor]:
        scale = getattr(self.weight, "SCB", None)  # moves to the layer's state at the first forward pass
        scale = self.state.SCB if scale is None else scale
        return partial(_from_8bit, scale=scale)


def _from_4bit(weight: Tensor, state: Any) -> Tensor:
    return bnb.functional.dequantize_4bit(weight.data, state)


def _from_8bit(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weight of int8 rows in which 127 stands for `scale` [out]."""
    return weight.data.float() * (scale / 127)[:, None]


def quantized_layer_class(module: nn.Module) -> type[AdapterLayer] | None:
    """Return the adapter layer class for a layer of bitsandbytes; None if it has none."""
    if isinstance(module, bnb.nn.Linear4bit):
        return AdaptedLinear4bit
    return AdaptedLinear8bit if isinstance(module, bnb.nn.Linear8bitLt) else None
