"""Adapters on linear layers: `nn.Linear`, and transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mmdora.adapters.layers.autocast import cast_input, no_autocast
from mmdora.adapters.layers.base import AdapterLayer, Shapes
from mmdora.adapters.ops.autograd import (
    AdaptedLinearFunction,
    LinearSettings,
    LinearTerms,
    as_is,
    kernels_for,
    transposed,
)


class InputGroup(Protocol):
    """Layers that read the same tensor and are computed in one call; see `SharedInput`."""

    def output(self, layer: LinearLayer, x: Tensor) -> Tensor | None: ...

    def dissolve(self) -> None: ...


class LinearLayer(AdapterLayer):
    """A layer with adapters that computes y = xWᵀ + b."""

    read: Any = staticmethod(as_is)  # returns the stored weight as the matrix [out, in]
    shared_input: InputGroup | None = None  # the layers that usually read the same x as this one

    def matrix(self) -> Tensor:
        return self.read(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        output = None if self.shared_input is None else self.shared_input.output(self, x)
        if output is None:
            return super().forward(x)
        self.check_frozen()
        return output

    def adapted(self, x: Tensor, name: str) -> Tensor:
        spec = self.specs[name]
        if spec.dropout and self.training and spec.peft_dropout and spec.use_dora:
            # PEFT computes the same: y = W(x − x') + b + g ⊙ (Wx' + sBAx'), where x' is x after dropout.
            x = cast_input(x)
            dropped = F.dropout(x, spec.dropout)
            with no_autocast(x.device.type):
                bias = None if self.bias is None else self.bias.to(x.dtype)
                rest = F.linear(x - dropped, self.matrix().to(x.dtype), bias)
                terms = self.terms(dropped, name)._replace(bias=None, dropped=None)
                return rest + AdaptedLinearFunction.apply(dropped, (self.settings(name),), False, *terms)[0]
        return linear_outputs([self], x, name)[0]

    def unwrap(self) -> None:
        if self.shared_input is not None:
            self.shared_input.dissolve()
        super().unwrap()

    def settings(self, name: str) -> LinearSettings:
        """Return the adapter's scale, norm key and weight reader for the autograd function."""
        return LinearSettings(self.specs[name].scale, self.norm_keys[name], torch.is_grad_enabled(), self.read)

    def terms(self, x: Tensor, name: str) -> LinearTerms:
        """Return the adapter's tensors for the autograd function, with dropout applied to x if it is on."""
        spec = self.specs[name]
        dropped = F.dropout(x, spec.dropout) if spec.dropout and self.training else None
        return LinearTerms(self.weight, self.bias, *self.factors(name), self.magnitude(name), dropped)


def linear_outputs(layers: Sequence[LinearLayer], x: Tensor, name: str) -> Sequence[Tensor]:
    """Return the outputs [..., out] of several layers, each with its adapter `name`, for one x [..., in]."""
    x = cast_input(x)
    with no_autocast(x.device.type):
        terms = [layer.terms(x, name) for layer in layers]
        merged = _merges([layer.specs[name].forward for layer in layers], terms, x)
        settings = tuple(layer.settings(name) for layer in layers)
        return AdaptedLinearFunction.apply(x, settings, merged, *(tensor for own in terms for tensor in own))


def _merges(forwards: Sequence[str], terms: Sequence[LinearTerms], x: Tensor) -> bool:
    """Return whether to multiply x by W + sBA instead of by W, A and B.

    Building W + sBA costs in · out · r operations, in the forward and again in the backward pass. The two products with
    A and B that it replaces cost tokens · (in + out) · r. So it pays off for many tokens, but in half precision it
    rounds the weights once more. Without Triton, A and B are then used in fp32, and the layer stays that exact.
    """
    if "exact" in forwards or any(t.dropped is not None or t.lora_b is None for t in terms):
        return False
    if "auto" not in forwards:
        return True
    if kernels_for(x.device).working_dtype(x.dtype) != x.dtype:
        return False
    width, outputs = x.shape[-1], sum(t.lora_b.shape[0] for t in terms if t.lora_b is not None)
    return x.numel() // width * (width + outputs) > 2 * width * outputs


class AdaptedLinear(LinearLayer, nn.Linear):
    """`nn.Linear` with adapters."""

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        assert isinstance(module, nn.Linear)
        return Shapes((rank, module.in_features), (module.out_features, rank), (module.out_features,))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix


class AdaptedConv1D(LinearLayer, Conv1D):
    """transformers' `Conv1D` (GPT-2) with adapters: a linear layer whose weight is stored as [in, out]."""

    read = staticmethod(transposed)

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        assert isinstance(module, Conv1D)
        return Shapes((rank, module.nx), (module.nf, rank), (module.nf,))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T
