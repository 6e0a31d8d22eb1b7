"""Compute linear layers that read the same tensor (q, k and v, or gate and up) in one call.

`INPUT_GROUPS` names the children of a module that usually read the same tensor. A name is only a hint: an output is
handed out only for the very tensor that it was computed from, unchanged since. A module whose children have such names
but read different tensors computes correctly; it only loses time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdora.adapters.layers.linear import LinearLayer, linear_outputs
from mmdora.core.deepspeed import is_partitioned
from mmdora.core.sharding import is_split, is_unit
from mmdora.models.resampler import Resampler

# Names of sibling layers that read the same tensor, from transformers and from this project's modules. A test compares
# them with transformers' source code.
INPUT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj", "gate_proj"),  # most models; attention with an output gate has a gate_proj
    ("gate_proj", "up_proj"),  # Llama's MLP
    ("query", "key", "value"),  # BERT, ViT
    ("query_proj", "key_proj", "value_proj"),  # ProphetNet, DeBERTa
    ("linear_q", "linear_k", "linear_v"),  # Conformer
    ("q", "k", "v"),  # T5
    ("q_a_proj", "kv_a_proj_with_mqa"),  # multi-head latent attention
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # Qwen 3.5's linear attention
    ("in_proj_qkvz", "in_proj_ba"),  # Qwen3-Next's linear attention
    ("wi_0", "wi_1"),  # T5's gated MLP
    ("w1", "w3"),  # LFM2's MLP
    ("sampling_offsets", "attention_weights"),  # deformable attention
)
# In cross-attention the query reads another tensor than key and value. It is recognized by the module's path and class.
QUERIES = {"q_proj", "query", "query_proj", "linear_q", "q"}
CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encdec|perceiver|pool", re.IGNORECASE)


def share_inputs(model: nn.Module) -> None:
    """Group the adapted layers of every module in `model` by `INPUT_GROUPS`; groups of one layer are left out."""
    for path, parent in model.named_modules():
        if isinstance(parent, Resampler):  # its q, k and v read three different tensors
            continue
        remaining = {name: child for name, child in parent.named_children() if isinstance(child, LinearLayer)}
        near = ".".join([*path.split(".")[-2:], type(parent).__name__])
        excluded = QUERIES if CROSS_ATTENTION.search(near) else set()
        for names in INPUT_GROUPS if len(remaining) > 1 else ():
            by_width: dict[int, list[str]] = {}
            for name in names:
                if name in remaining and name not in excluded:
                    by_width.setdefault(_in_features(remaining[name]), []).append(name)
            for group in by_width.values():
                if len(group) > 1:
                    SharedInput.unite(parent, [remaining.pop(name) for name in group])


@dataclass
class _Computed:
    """The outputs that one tensor gave, by the index of the layer that has not taken its output yet."""

    x: Tensor
    version: int  # of x when the outputs were computed; an in-place change of x increases it
    outputs: dict[int, Tensor]


class SharedInput:
    """Layers of one parent module that usually read the same tensor.

    The first layer that is called computes the outputs of all; the others hand theirs out. This happens only inside the
    parent's forward pass, and only if gradients are enabled. Under torch.compile, which cannot compare the versions of
    a tensor, each layer computes alone. So do shallow copies of the layers, such as replicas of `nn.DataParallel`.
    """

    def __init__(self, parent: nn.Module, layers: list[LinearLayer]):
        self.layers = layers
        self.in_forward = False
        self.computed: _Computed | None = None
        self.hooks = [
            parent.register_forward_pre_hook(self._begin),
            parent.register_forward_hook(self._end, always_call=True),
        ]

    @classmethod
    def unite(cls, parent: nn.Module, layers: list[LinearLayer]) -> None:
        """Make the layers one group; groups that they were in before are dissolved."""
        before = [layer.shared_input for layer in layers]
        if isinstance(before[0], cls) and before[0].layers == layers:
            return
        for group in before:
            if group is not None:
                group.dissolve()
        united = cls(parent, layers)
        for layer in layers:
            layer.shared_input = united

    def dissolve(self) -> None:
        """Let every layer compute alone again."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            layer.__dict__.pop("shared_input", None)
        self.layers = []

    def output(self, layer: LinearLayer, x: Tensor) -> Tensor | None:
        """Return the layer's output for x, or None if the layer has to compute alone."""
        if not self.in_forward or not torch.is_grad_enabled() or layer.active is None or is_unit(layer):
            return None
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        place = next((i for i, other in enumerate(self.layers) if other is layer), None)
        if place is None:  # a shallow copy of a layer
            return None
        if self.computed is None:
            places = [i for i, other in enumerate(self.layers) if _can_share(other, layer.active, x)]
            if len(places) < 2:
                return None
            outputs = linear_outputs([self.layers[i] for i in places], x, layer.active)
            self.computed = _Computed(x, x._version, dict(zip(places, outputs, strict=True)))
        computed = self.computed
        if computed.x is not x or computed.version != x._version or place not in computed.outputs:
            return None
        output = computed.outputs.pop(place)
        if not computed.outputs:
            self.computed = None
        return output

    def _begin(self, *_: Any) -> None:
        self.in_forward, self.computed = True, None

    def _end(self, *_: Any) -> None:
        self.in_forward, self.computed = False, None


def _in_features(layer: LinearLayer) -> int:
    return layer.shapes(layer, 1).a[1]


def _can_share(layer: LinearLayer, name: str, x: Tensor) -> bool:
    """Return whether the layer's output for x may be computed when another layer is called.

    Not if the batch rows have adapters of their own, another adapter is active, or dropout works as in PEFT. Not if
    the weight is only present while the layer itself is called (ZeRO-3, `fully_shard` on the layer, offloading).
    """
    if layer.active != name or layer.row_adapters is not None or name not in layer.specs:
        return False
    spec, weight = layer.specs[name], layer.weight
    peft_dropout = spec.dropout and layer.training and spec.peft_dropout
    own_weight = is_partitioned(weight) or is_unit(layer) or is_split(weight)
    return not peft_dropout and weight.device == x.device and not own_weight
