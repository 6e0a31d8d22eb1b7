"""Adapters on linear layers: `nn.Linear`, and transformers' `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mmdora.adapters.functional import AdaptedLinearFunction, as_is, transposed
from mmdora.adapters.layer import AdapterLayer, Shapes


class LinearLayer(AdapterLayer):
    """What is linear in x, by one autograd function that saves little and multiplies no more than it must."""

    read: Any = staticmethod(as_is)  # how that function sees the weight as a matrix [out, in]

    def matrix(self) -> Tensor:
        return self.read(self.weight)

    def adapted(self, x: Tensor, name: str) -> Tensor:
        spec, bias = self.specs[name], self.bias
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        dropped = F.dropout(x, spec.dropout) if spec.dropout and self.training else None
        with torch.autocast(device, enabled=False):
            rest = None
            if dropped is not None and spec.peft_dropout and spec.use_dora:
                # y = W(x − x') + b + g ⊙ (Wx' + sBAx'), x' the dropped input: what PEFT computes.
                weight = self.read(self.weight).to(x.dtype)
                rest = F.linear(x - dropped, weight, None if bias is None else bias.to(x.dtype))
                x, dropped, bias = dropped, None, None
            a, b = self.factors(name)
            magnitude, norm = (self.magnitude(name), self.norm(name)) if spec.use_dora else (None, None)
            y = AdaptedLinearFunction.apply(x, dropped, self.weight, bias, a, b, magnitude, norm, spec.scale, self.read)
        return y if rest is None else y + rest


class AdaptedLinear(LinearLayer, nn.Linear):
    @staticmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        assert isinstance(module, nn.Linear)
        return Shapes((rank, module.in_features), (module.out_features, rank), (module.out_features,))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix


class AdaptedConv1D(LinearLayer, Conv1D):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored [in, out]."""

    read = staticmethod(transposed)

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        assert isinstance(module, Conv1D)
        return Shapes((rank, module.nx), (module.nf, rank), (module.nf,))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T
