"""Adapters on expert weights that a mixture-of-experts block holds as one parameter [experts, out, in] (Mixtral, Qwen).

Such a block multiplies by slices of its parameter, in ways of its own. So the adapted weight is built whole at every
forward pass and stands in the parameter's place while the block runs; the backward pass reads what the block itself
has saved of it. PEFT has no DoRA for these weights.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from mmdora.adapters.layers.base import AdapterLayer, Shapes
from mmdora.adapters.ops.functional import MergedWeightFunction
from mmdora.core.deepspeed import true_shape


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters [experts, …, …] of a module that says how many experts it has."""
    experts = getattr(module, "num_experts", None)
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(experts, int) and parameter.dim() == 3 and parameter.shape[0] == experts
    }


class AdaptedExperts(AdapterLayer):
    """The adapters of one such parameter, as a child `<parameter>_adapter` of the block that holds it."""

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

    @staticmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        assert isinstance(module, AdaptedExperts)
        return expert_shapes(module.block, module.parameter, rank)

    def matrix(self) -> Tensor:
        return self.weight.mT if is_transposed(self.block) else self.weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT if is_transposed(self.block) else matrix

    def factors(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        if not self.specs[name].rank:
            return None, None
        a, b = (getattr(self, attribute)[name] for attribute in self.low_rank)
        return a, b

    def magnitude(self, name: str) -> Tensor | None:
        return self.lora_magnitude_vector[name] if self.specs[name].use_dora else None

    def forward(self) -> Tensor:  # type: ignore[override]
        """The weight with the active adapter, in the parameter's own shape and dtype."""
        if self.rows is not None:
            raise ValueError("the weights of experts cannot take adapters row by row: tokens of all rows share them")
        return self._with(self.active, self.weight)

    def plain(self, x: Tensor) -> Tensor:
        return x

    def adapted(self, x: Tensor, name: str) -> Tensor:
        """The block multiplies, not its weights: what comes in and goes out here is the weight itself."""
        spec = self.specs[name]
        magnitude, norm = (self.magnitude(name), self.norm(name)) if spec.use_dora else (None, None)
        merged = MergedWeightFunction.apply(self.matrix(), *self.factors(name), magnitude, norm, spec.scale)
        return self.from_matrix(merged)

    def merge(self, name: str) -> None:
        merged = self.from_matrix(self.merged(name)).to(self.weight.dtype)
        self.block._parameters[self.parameter] = nn.Parameter(merged.contiguous(), requires_grad=False)
        self.unwrap()

    def unwrap(self) -> None:
        del self.block._modules[f"{self.parameter}_adapter"]
        if not any(isinstance(child, AdaptedExperts) for child in self.block.children()):
            self.block.__class__ = type(self.block).__mro__[2]


class AdaptedBlock(nn.Module):
    """Mixed into the class of a block of experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapters = [child for child in self.children() if isinstance(child, AdaptedExperts)]
        # An instance's own attribute comes before its registered parameter of the same name.
        self.__dict__.update({adapter.parameter: adapter() for adapter in adapters})
        try:
            return super().forward(*args, **kwargs)
        finally:
            for adapter in adapters:
                del self.__dict__[adapter.parameter]

    def __reduce__(self) -> Any:
        return _empty_block, (type(self).__mro__[2],), self.__dict__


def _empty_block(base: type[nn.Module]) -> nn.Module:
    kind = _adapted_class(base)  # type: ignore[arg-type]
    return kind.__new__(kind)


@functools.cache
def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{base.__name__}", (AdaptedBlock, base), {})


def adopt_experts(block: nn.Module, parameter: str) -> AdaptedExperts:
    """The adapter layer for one parameter of the block, put there if it has none yet."""
    child = f"{parameter}_adapter"
    if child not in block._modules:
        if not isinstance(block, AdaptedBlock):
            block.__class__ = _adapted_class(type(block))  # type: ignore[arg-type]
        block._modules[child] = AdaptedExperts(block, parameter)
    adapter = block._modules[child]
    assert isinstance(adapter, AdaptedExperts)
    return adapter


def is_transposed(block: nn.Module) -> bool:
    """Whether the weights are [experts, in, out], as transformers says of the families that are so (of most)."""
    unsaid = any(kind.__name__ == "Llama4TextExperts" for kind in type(block).__mro__)
    return unsaid or bool(getattr(block, "is_transposed", False))


def expert_shapes(block: nn.Module, parameter: str, rank: int) -> Shapes:
    experts, out, width = true_shape(block._parameters[parameter])  # type: ignore[arg-type]
    if is_transposed(block):
        out, width = width, out
    return Shapes((experts, rank, width), (experts, out, rank), (experts, out))
