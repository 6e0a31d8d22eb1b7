"""Adapters on a mixture-of-experts block, whose experts share one parameter [experts, out, in] (Mixtral, Qwen).

Such a block multiplies by slices of its parameter in code of its own. So the adapted weight W' of all experts is built
in every forward pass and replaces the parameter while the block runs. The backward pass uses what the block's own
operations saved of W'. PEFT has no DoRA for these weights.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from mmdora.adapters.layers.base import AdapterLayer, Shapes
from mmdora.adapters.ops.autograd import MergedWeightFunction
from mmdora.core.deepspeed import true_shape
from mmdora.core.errors import UserError


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters [experts, ., .] of a module that has the attribute `num_experts`, by name."""
    experts = getattr(module, "num_experts", None)
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(experts, int) and parameter.dim() == 3 and parameter.shape[0] == experts
    }


class AdaptedExperts(AdapterLayer):
    """The adapters of one such parameter: a child `<parameter>_adapter` of the block that owns the parameter."""

    takes_dropout = False
    in_peft = False
    bias = None
    block: Any

    def __init__(self, block: nn.Module, parameter: str):
        nn.Module.__init__(self)
        self.__dict__["block"] = block  # not as a child: it is the parent
        self.parameter = parameter
        self.adopt()

    @property
    def weight(self) -> Any:
        return self.block._parameters[self.parameter]

    @property
    def weight_holder(self) -> tuple[nn.Module, str]:
        return self.block, self.parameter

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        assert isinstance(module, AdaptedExperts)
        return expert_shapes(module.block, module.parameter, rank)

    def matrix(self) -> Tensor:
        return self.weight.mT if is_transposed(self.block) else self.weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT if is_transposed(self.block) else matrix

    def holders(self) -> list[nn.Module]:
        return [self.block, *self.modules()]

    def factors(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        if not self.specs[name].rank:
            return None, None
        a, b = (getattr(self, attribute)[name] for attribute in self.low_rank)
        return a, b

    def magnitude(self, name: str) -> Tensor | None:
        return self.lora_magnitude_vector[name] if self.specs[name].use_dora else None

    def forward(self) -> Tensor:  # type: ignore[override]
        """Return W' of the active adapter, in the parameter's own shape and dtype."""
        if self.row_adapters is not None:
            raise ValueError("adapters_by_row does not work for expert weights: tokens of all rows share them")
        return self._output(self.weight, self.active)

    def plain(self, x: Tensor) -> Tensor:
        return x

    def adapted(self, x: Tensor, name: str) -> Tensor:
        """Return W' for the weight x; the block itself does the multiplication."""
        spec = self.specs[name]
        magnitude, norm = (self.magnitude(name), self.norm(name)) if spec.use_dora else (None, None)
        merged = MergedWeightFunction.apply(self.matrix(), *self.factors(name), magnitude, norm, spec.scale)
        return self.from_matrix(merged)

    def _replicate_for_data_parallel(self) -> AdapterLayer:
        raise UserError("nn.DataParallel does not work with adapters on expert weights; use DistributedDataParallel")

    def unwrap(self) -> None:
        del self.block._modules[f"{self.parameter}_adapter"]
        if not any(isinstance(child, AdaptedExperts) for child in self.block.children()):
            self.block.__class__ = type(self.block).__mro__[2]


class AdaptedBlock(nn.Module):
    """Mixin for the class of a block of experts: sets the adapted weights for its forward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = [child for child in self.children() if isinstance(child, AdaptedExperts)]
        # An attribute in the instance's __dict__ takes precedence over the registered parameter of that name.
        self.__dict__.update({adapter.parameter: adapter() for adapter in adapters})
        try:
            return super().forward(*args, **kwargs)
        finally:
            for adapter in adapters:
                del self.__dict__[adapter.parameter]

    def __reduce__(self) -> Any:
        return _empty_block, (type(self).__mro__[2],), self.__dict__


def _empty_block(base: type[nn.Module]) -> nn.Module:
    adapted = _adapted_class(base)  # type: ignore[arg-type]
    return adapted.__new__(adapted)


@functools.cache
def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{base.__name__}", (AdaptedBlock, base), {})


def adopt_experts(block: nn.Module, parameter: str) -> AdaptedExperts:
    """Return the adapter layer of one parameter of the block, and create it if there is none."""
    child = f"{parameter}_adapter"
    if child not in block._modules:
        if not isinstance(block, AdaptedBlock):
            block.__class__ = _adapted_class(type(block))  # type: ignore[arg-type]
        block._modules[child] = AdaptedExperts(block, parameter)
    adapter = block._modules[child]
    assert isinstance(adapter, AdaptedExperts)
    return adapter


def is_transposed(block: nn.Module) -> bool:
    """Return whether the weights are [experts, in, out].

    transformers marks such blocks with `is_transposed`, but for Llama 4.
    """
    unmarked = any(base.__name__ == "Llama4TextExperts" for base in type(block).__mro__)
    return unmarked or bool(getattr(block, "is_transposed", False))


def expert_shapes(block: nn.Module, parameter: str, rank: int) -> Shapes:
    """Return A [experts, r, in], B [experts, out, r] and magnitude [experts, out]."""
    experts, out, width = true_shape(block._parameters[parameter])  # type: ignore[arg-type]
    if is_transposed(block):
        out, width = width, out
    return Shapes((experts, rank, width), (experts, out, rank), (experts, out))
