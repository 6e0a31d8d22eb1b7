"""Turn modules of a model into adapter layers, and find them by path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mmdora.adapters.layers.base import AdapterLayer, Shape, change_class
from mmdora.adapters.layers.convolution import AdaptedConv1d, AdaptedConv2d, AdaptedConv3d
from mmdora.adapters.layers.embedding import AdaptedEmbedding
from mmdora.adapters.layers.experts import AdaptedExperts, adopt_experts, expert_parameters, expert_shapes
from mmdora.adapters.layers.linear import AdaptedConv1D, AdaptedLinear
from mmdora.adapters.spec import LowRankSpec
from mmdora.models.quantization import ORIGINAL_DTYPE

LAYERS: dict[type[nn.Module], type[AdapterLayer]] = {
    nn.Linear: AdaptedLinear,
    Conv1D: AdaptedConv1D,
    nn.Conv1d: AdaptedConv1d,
    nn.Conv2d: AdaptedConv2d,
    nn.Conv3d: AdaptedConv3d,
    nn.Embedding: AdaptedEmbedding,
}
# Children's names in torch's `CheckpointWrapper` and `OptimizedModule`, which give out attributes of these children.
WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod"})


def layer_class(module: nn.Module) -> type[AdapterLayer] | None:
    """Return the adapter layer class that a module has or can take; None if it cannot have adapters.

    Only the classes in `LAYERS` themselves count, since a subclass may compute anything. The exceptions are layers of
    bitsandbytes, transformers' scaled embeddings, and Falcon's linear layer, which computes what `nn.Linear` does.
    """
    if isinstance(module, AdapterLayer):
        return type(module)
    if type(module).__module__.startswith("bitsandbytes."):
        from mmdora.adapters.layers.quantized import quantized_layer_class

        return quantized_layer_class(module)
    if is_weight_computed(module):
        return None
    if isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        return AdaptedEmbedding
    if type(module).__name__ == "FalconLinear":
        return AdaptedLinear
    return LAYERS.get(type(module))


def is_weight_computed(module: nn.Module) -> bool:
    """Return whether a module's weight is computed from other parameters: by a parametrization, or `weight_norm`."""
    return isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters


def adopt(module: nn.Module) -> AdapterLayer:
    """Turn a module into an adapter layer in place, and return it. `layer_class(module)` must not be None."""
    if not isinstance(module, AdapterLayer):
        new = layer_class(module)
        assert new is not None
        module.__dict__["base_class"] = type(module)
        change_class(module, new)
        assert isinstance(module, AdapterLayer)
        module.adopt()
    return module


def name_original_dtype(model: nn.Module) -> None:
    """Note the model's dtype on layers that bitsandbytes quantized elsewhere, for when they are dequantized."""
    for module in model.modules():
        quantized = any(base.__module__.startswith("bitsandbytes.") for base in type(module).__mro__)
        if quantized and hasattr(model, "dtype") and not hasattr(module, ORIGINAL_DTYPE):
            setattr(module, ORIGINAL_DTYPE, model.dtype)


def dequantize(model: nn.Module) -> None:
    """Turn the layers that bitsandbytes quantized into `nn.Linear`, in place."""
    name_original_dtype(model)
    quantized = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    for module in quantized:
        if layer_class(module) is not None:
            cast(Any, adopt(module)).dequantize()
    quantizer = getattr(model, "hf_quantizer", None)
    if quantized and quantizer is not None:
        quantizer.remove_quantization_config(model)


def wrap(model: nn.Module, path: str) -> AdapterLayer:
    """Return the adapter layer at `path`, which is created if needed.

    `path` names a module, or a parameter that holds the weights of experts.
    """
    parent, _, leaf = path.rpartition(".")
    if leaf in expert_parameters(model.get_submodule(parent)):
        layer: AdapterLayer = adopt_experts(model.get_submodule(parent), leaf)
    else:
        layer = adopt(model.get_submodule(path))
    layer.path = path
    return layer


def takes_dropout(model: nn.Module, path: str) -> bool:
    """Return whether the layer at `path` has an input to which dropout can apply."""
    parent, _, leaf = path.rpartition(".")
    if leaf in expert_parameters(model.get_submodule(parent)):
        return AdaptedExperts.takes_dropout
    layer = layer_class(model.get_submodule(path))
    return layer is not None and layer.takes_dropout


def tensor_shapes(model: nn.Module, path: str, spec: LowRankSpec) -> dict[str, Shape] | None:
    """Return the shapes of an adapter's tensors at `path`; None if no layer there can have adapters."""
    parent, _, leaf = path.rpartition(".")
    try:
        holder = model.get_submodule(parent)
        if leaf in expert_parameters(holder):
            return AdaptedExperts.named_shapes(expert_shapes(holder, leaf, spec.rank), spec)
        module = model.get_submodule(path)
    except AttributeError:
        return None
    layer = layer_class(module)
    return None if layer is None else layer.named_shapes(layer.shapes(module, spec.rank), spec)


def plain_path(path: str) -> str:
    """Return a path without the modules that torch's activation checkpointing and torch.compile put around others."""
    return ".".join(name for name in path.split(".") if name not in WRAPPERS)


def adapter_layers(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, AdapterLayer]]:
    """Yield every adapter layer with its plain path; with `name`, only those that have an adapter of that name."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer) and (name is None or name in module.specs):
            plain = plain_path(path)
            yield plain.removesuffix("_adapter") if isinstance(module, AdaptedExperts) else plain, module
