"""Adapters on linear layers: `nn.Linear`, and transformers' `Conv1D`."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mmdora.adapters.functional import AdaptedLinearFunction, SharedDownFunction, as_is, transposed
from mmdora.adapters.layer import AdapterLayer, Shapes

# Siblings that read the same input, by the names that transformers gives them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


class SharedInput:
    """Layers called one after the other with the same input: A reads it once for all of them.

    The first that is called computes xAᵀ for every one; the others find theirs. One that is then called with another
    tensor (the keys and values of cross-attention) leaves the group, and computes its own.
    """

    def __init__(self, layers: list[LinearLayer]):
        self.layers = layers
        self.input: weakref.ref[Tensor] | None = None
        self.state: tuple[Any, ...] = ()
        self.found: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        new = memo[id(self)] = SharedInput([])
        new.layers = copy.deepcopy(self.layers, memo)
        return new

    def __getstate__(self) -> list[LinearLayer]:
        return self.layers

    def __setstate__(self, layers: list[LinearLayer]) -> None:
        SharedInput.__init__(self, layers)

    def down(self, layer: LinearLayer, given: Tensor, x: Tensor, name: str) -> Tensor | None:
        """xAᵀ [rows, r] for `layer`, x being what it was given, in the dtype to compute in; None: nothing is shared."""
        training = torch.is_grad_enabled() and not given.is_inference()
        if not training or torch.compiler.is_compiling() or layer not in self.layers:
            return None
        state = (name, given._version)
        if self.input is not None and self.input() is given and self.state == state and id(layer) in self.found:
            return self.found.pop(id(layer))
        if id(layer) in self.found and layer is not self.layers[0]:
            self.layers.remove(layer)
            return None
        users = [other for other in self.layers if other.can_share(name)]
        if len(users) < 2 or layer not in users:
            return None
        parts = SharedDownFunction.apply(x, *(other.factors(name)[0] for other in users))
        self.input, self.state = weakref.ref(given), state
        self.found = {id(other): part for other, part in zip(users, parts, strict=True)}
        return self.found.pop(id(layer))


def share_inputs(model: nn.Module) -> None:
    """Tell the adapted siblings of every attention and MLP of one another."""
    for parent in model.modules():
        for names in SIBLINGS:
            layers = [child for name in names if isinstance(child := getattr(parent, name, None), LinearLayer)]
            shared = SharedInput(layers) if len(layers) > 1 else None
            for layer in layers:
                layer.__dict__["shared"] = shared


class LinearLayer(AdapterLayer):
    """What is linear in x, by one autograd function that saves little and multiplies no more than it must."""

    read: Any = staticmethod(as_is)  # how that function sees the weight as a matrix [out, in]
    shared: SharedInput | None = None  # with the siblings that read the same input

    def matrix(self) -> Tensor:
        return self.read(self.weight)

    def can_share(self, name: str) -> bool:
        """Whether a sibling may read this layer's A before the layer itself is called."""
        if self.active != name or name not in self.specs or self.rows is not None:
            return False
        spec = self.specs[name]
        if spec.use_vera or not spec.rank or (spec.dropout and self.training):
            return False
        return not hasattr(self.lora_A[name], "ds_id")  # ZeRO-3 gathers it for the layer's own forward pass alone

    def adapted(self, x: Tensor, name: str) -> Tensor:
        spec, bias, given = self.specs[name], self.bias, x
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
            h = None
            if dropped is None and self.shared is not None:
                h = self.shared.down(self, given, x, name)
                a = a if h is None else None
            magnitude, norm = (self.magnitude(name), self.norm(name)) if spec.use_dora else (None, None)
            y = AdaptedLinearFunction.apply(
                x, dropped, self.weight, bias, a, b, magnitude, norm, spec.scale, self.read, h
            )
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
