"""Adapters on linear layers: `nn.Linear`, and transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mmdora.adapters.layers.base import AdapterLayer, Shapes
from mmdora.adapters.ops.linear_function import AdaptedLinearFunction, LinearForm, LinearTerms, as_is, transposed


class LinearLayer(AdapterLayer):
    """What is linear in x."""

    read: Any = staticmethod(as_is)  # how the autograd function sees the weight as a matrix [out, in]
    siblings: Any = None  # `Siblings`: layers that are handed the same x, and do part of the work together

    def matrix(self) -> Tensor:
        return self.read(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        shared = None if self.siblings is None else self.siblings.output(self, x)
        return super().forward(x) if shared is None else shared

    def adapted(self, x: Tensor, name: str) -> Tensor:
        spec = self.specs[name]
        if spec.dropout and self.training and spec.peft_dropout and spec.use_dora:
            # y = W(x − x') + b + g ⊙ (Wx' + sBAx'), x' the dropped input: what PEFT computes.
            x = _autocast(x)
            dropped = F.dropout(x, spec.dropout)
            with _no_autocast(x.device.type):
                bias = None if self.bias is None else self.bias.to(x.dtype)
                rest = F.linear(x - dropped, self.matrix().to(x.dtype), bias)
                terms = self.terms(dropped, name)._replace(bias=None, dropped=None)
                return rest + AdaptedLinearFunction.apply(dropped, (self.form(name),), False, *terms)[0]
        return linear_outputs([self], x, name)[0]

    def unwrap(self) -> None:
        if self.siblings is not None:
            self.siblings.part()
        super().unwrap()

    def form(self, name: str) -> LinearForm:
        return LinearForm(self.specs[name].scale, self.keys[name], self.read)

    def terms(self, x: Tensor, name: str) -> LinearTerms:
        spec = self.specs[name]
        dropped = F.dropout(x, spec.dropout) if spec.dropout and self.training else None
        return LinearTerms(self.weight, self.bias, *self.factors(name), self.magnitude(name), dropped)


def linear_outputs(layers: Sequence[LinearLayer], x: Tensor, name: str) -> Sequence[Tensor]:
    """The outputs of several layers, each with its adapter `name`, for one x [..., in]."""
    x = _autocast(x)
    with _no_autocast(x.device.type):
        terms = [layer.terms(x, name) for layer in layers]
        merged = _merges([layer.specs[name].forward for layer in layers], terms, x)
        forms = tuple(layer.form(name) for layer in layers)
        return AdaptedLinearFunction.apply(x, forms, merged, *(tensor for each in terms for tensor in each))


def _merges(forwards: Sequence[str], terms: Sequence[LinearTerms], x: Tensor) -> bool:
    """Whether to add BA to W. It takes as long as there are weights, twice (forward and backward), where the two
    skinny products that it saves take as long as there are inputs and outputs."""
    if "exact" in forwards or any(t.dropped is not None or t.lora_b is None for t in terms):
        return False
    if "auto" not in forwards:
        return True
    width, outputs = x.shape[-1], sum(t.lora_b.shape[0] for t in terms if t.lora_b is not None)
    return x.numel() // width * (width + outputs) > 2 * width * outputs


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if enabled else x


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    # The meta device, on which `mmdora plan` runs a model, has none.
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


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
