"""Which modules can become adapter layers, and those of a model by path."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from mmdora.adapters.layers.base import AdapterLayer, Shape, become
from mmdora.adapters.layers.convolution import AdaptedConv1d, AdaptedConv2d, AdaptedConv3d
from mmdora.adapters.layers.embedding import AdaptedEmbedding
from mmdora.adapters.layers.experts import AdaptedExperts, adopt_experts, expert_parameters, expert_shapes
from mmdora.adapters.layers.linear import AdaptedConv1D, AdaptedLinear
from mmdora.adapters.spec import LowRankSpec

LAYERS: dict[type[nn.Module], type[AdapterLayer]] = {
    nn.Linear: AdaptedLinear,
    Conv1D: AdaptedConv1D,
    nn.Conv1d: AdaptedConv1d,
    nn.Conv2d: AdaptedConv2d,
    nn.Conv3d: AdaptedConv3d,
    nn.Embedding: AdaptedEmbedding,
}


def layer_kind(module: nn.Module) -> type[AdapterLayer] | None:
    """The kind of adapter layer that a module can become, or is; None where it can be none.

    A subclass may compute anything, so only the classes themselves count; and embeddings that transformers scales.
    """
    if isinstance(module, AdapterLayer):
        return type(module)
    if type(module).__module__.startswith("bitsandbytes."):
        from mmdora.adapters.layers.quantized import quantized_kind

        return quantized_kind(module)
    if isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        return AdaptedEmbedding
    return LAYERS.get(type(module))


def adopt(module: nn.Module) -> AdapterLayer:
    """The module as an adapter layer: its class changes, in place. The module must be of a kind that can."""
    if not isinstance(module, AdapterLayer):
        kind = layer_kind(module)
        assert kind is not None
        module.__dict__["base_class"] = type(module)
        become(module, kind)
        assert isinstance(module, AdapterLayer)
        module.adopt()
    return module


def wrap(model: nn.Module, path: str) -> AdapterLayer:
    """The adapter layer at `path`: a module's, or that of a parameter which holds the weights of experts."""
    parent, _, leaf = path.rpartition(".")
    if leaf in expert_parameters(model.get_submodule(parent)):
        return adopt_experts(model.get_submodule(parent), leaf)
    return adopt(model.get_submodule(path))


def takes_dropout(model: nn.Module, path: str) -> bool:
    """Whether dropout means anything to the layer at `path`."""
    parent, _, leaf = path.rpartition(".")
    if leaf in expert_parameters(model.get_submodule(parent)):
        return AdaptedExperts.takes_dropout
    kind = layer_kind(model.get_submodule(path))
    return kind is not None and kind.takes_dropout


def tensor_shapes(model: nn.Module, path: str, spec: LowRankSpec) -> dict[str, Shape] | None:
    """The shapes of the tensors that such an adapter would have there; None where there can be none."""
    parent, _, leaf = path.rpartition(".")
    try:
        holder = model.get_submodule(parent)
        if leaf in expert_parameters(holder):
            return AdaptedExperts.named_shapes(expert_shapes(holder, leaf, spec.rank), spec)
        module = model.get_submodule(path)
    except AttributeError:
        return None
    kind = layer_kind(module)
    return None if kind is None else kind.named_shapes(kind.shapes(module, spec.rank), spec)


def adapter_layers(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapter layer with its path; only those that have an adapter called `name`, where one is given."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer) and (name is None or name in module.specs):
            yield path.removesuffix("_adapter") if isinstance(module, AdaptedExperts) else path, module
