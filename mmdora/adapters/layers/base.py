"""The contract of a layer with adapters, whatever its kind.

A layer becomes an adapter layer in place, by a change of its class: every reference to it (a layer used twice, tied
weights, hooks) stays good, and a base model's state dict fits before and after. Each kind of layer says how its frozen
weight reads as a matrix [out, in]; the mathematics is the same for all of them.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmdora.adapters.ops import norm_cache
from mmdora.adapters.ops.functional import dora_gain, dora_norm, merged_weight
from mmdora.adapters.spec import LowRankSpec
from mmdora.core.deepspeed import gathered

Shape = tuple[int, ...]


class Shapes(NamedTuple):
    """Of an adapter's tensors: A, B, and the magnitude."""

    a: Shape
    b: Shape
    magnitude: Shape


class Projection(nn.Module):
    """VeRA's pair of random matrices (arXiv 2310.11454), shared by the layers of one part and never trained."""

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.register_buffer("vera_A", a, persistent=False)  # [r, widest input]
        self.register_buffer("vera_B", b, persistent=False)  # [widest output, r]


class AdapterLayer(nn.Module, ABC):
    """A layer with adapters beside its frozen weight, as parameters `lora_A.<name>`, `lora_B.<name>` and so on.

    `active` is the adapter that the forward pass uses; None is the base layer alone. `rows` holds a name (or None) for
    each row of the batch where rows use adapters of their own.
    """

    low_rank: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    file_suffix: ClassVar[str] = ".weight"  # of A and B in PEFT's files
    takes_dropout: ClassVar[bool] = True  # whether there is an input whose numbers can be dropped
    in_peft: bool = True  # whether PEFT computes the same from the same tensors

    weight: Any
    bias: Any
    vera: Any  # these are there once an adapter needs them: by name
    vera_lambda_d: Any
    vera_lambda_b: Any
    lora_magnitude_vector: Any
    base_class: type[nn.Module]
    specs: dict[str, LowRankSpec]
    keys: dict[str, int]  # under which this layer's norms are kept
    active: str | None
    rows: Sequence[str | None] | None

    @staticmethod
    @abstractmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        """The shapes of an adapter's tensors on such a layer, plain or adapted."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The frozen weight as [out, in]; DoRA's norm is over its rows."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The way back: a weight of this layer's own shape."""

    @abstractmethod
    def adapted(self, x: Tensor, name: str) -> Tensor:
        """The layer's output with the adapter `name`."""

    def adopt(self) -> None:
        """What a layer needs when it has just become an adapter layer."""
        self.specs, self.keys, self.active, self.rows = {}, {}, None, None

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            return self._row_by_row(x, self.rows)
        return self._with(self.active, x)

    def _with(self, name: str | None, x: Tensor) -> Tensor:
        return self.plain(x) if name is None or name not in self.specs else self.adapted(x, name)

    def plain(self, x: Tensor) -> Tensor:
        """The base layer's output."""
        return self.base_class.forward(self, x)

    def _row_by_row(self, x: Tensor, rows: Sequence[str | None]) -> Tensor:
        if x.shape[0] != len(rows):
            raise ValueError(f"{len(rows)} adapters are named for the rows of a batch of {x.shape[0]}")
        out: Tensor | None = None
        for name in dict.fromkeys(rows):
            index = torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
            some = self._with(name, x[index])
            out = some.new_empty(len(rows), *some.shape[1:]) if out is None else out
            out = out.index_copy(0, index, some)
        assert out is not None
        return out

    # The adapter's own parameters

    def add_adapter(self, name: str, spec: LowRankSpec, seed: int = 0, shared: Projection | None = None) -> None:
        """New parameters that leave the layer's function as it is, the same for the same seed; all in fp32, since a
        bf16 magnitude rounds its updates to zero."""
        shapes = self.shapes(self, spec.rank)
        device = self.weight.device
        if spec.use_vera:
            assert shared is not None
            self._put("vera", name, shared)
            self._put("vera_lambda_d", name, nn.Parameter(torch.full((spec.rank,), 0.1, device=device)))
            self._put("vera_lambda_b", name, nn.Parameter(torch.zeros(shapes.b[0], device=device)))
        elif spec.rank:
            a = torch.empty(shapes.a, device="meta" if device.type == "meta" else "cpu")
            b = torch.zeros(shapes.b, device=device)
            # Drawn on the CPU from a generator of its own: the same numbers on every device and in every process.
            self.initialize(a, b, torch.Generator().manual_seed(seed))
            self._put(self.low_rank[0], name, nn.Parameter(a.to(device)))
            self._put(self.low_rank[1], name, nn.Parameter(b))
        if spec.use_dora:
            with gathered([self.weight]), torch.no_grad():
                norm = torch.linalg.vector_norm(self.matrix(), dim=-1, dtype=torch.float32)
            self._put("lora_magnitude_vector", name, nn.Parameter(norm.view(shapes.magnitude)))
        self.specs[name], self.keys[name] = spec, norm_cache.new_key()
        self.active = name

    def initialize(self, a: Tensor, b: Tensor, generator: torch.Generator) -> None:
        """A Kaiming-uniform, B zero as it is."""
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)

    def _put(self, attribute: str, name: str, value: Any) -> None:
        if not hasattr(self, attribute):
            setattr(self, attribute, nn.ModuleDict() if isinstance(value, nn.Module) else nn.ParameterDict())
        getattr(self, attribute)[name] = value

    def remove_adapter(self, name: str) -> None:
        for attribute in (*self.low_rank, "vera", "vera_lambda_d", "vera_lambda_b", "lora_magnitude_vector"):
            held = getattr(self, attribute, {})
            if name in held:
                del held[name]
        del self.specs[name], self.keys[name]
        self.active = None if self.active == name else self.active

    @classmethod
    def named_shapes(cls, shapes: Shapes, spec: LowRankSpec) -> dict[str, Shape]:
        """The shapes of an adapter's tensors by their names in PEFT's files."""
        found: dict[str, Shape] = {}
        if spec.use_vera:
            found |= {"vera_lambda_d": (spec.rank,), "vera_lambda_b": shapes.b[:1]}
        elif spec.rank:
            found |= {f"{n}{cls.file_suffix}": s for n, s in zip(cls.low_rank, (shapes.a, shapes.b), strict=True)}
        return found | ({"lora_magnitude_vector": shapes.magnitude} if spec.use_dora else {})

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in PEFT's files: `lora_A.weight`, …"""
        spec = self.specs[name]
        names = self.named_shapes(self.shapes(self, spec.rank), spec)
        return {n: getattr(self, n.removesuffix(self.file_suffix))[name] for n in names}

    # The adapter as mathematics: W' = g ⊙ (W + sBA), on matrices

    def factors(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """A [r, in] and B [out, r]; None where no direction is learnt."""
        spec = self.specs[name]
        if spec.use_vera:
            shared = self.vera[name]
            d, b = self.vera_lambda_d[name], self.vera_lambda_b[name]
            width, height = self.shapes(self, spec.rank)[0][1], b.shape[0]
            return shared.vera_A[:, :width] * d[:, None], shared.vera_B[:height] * b[:, None]
        if not spec.rank:
            return None, None
        a, b = (getattr(self, attribute)[name] for attribute in self.low_rank)
        return a.flatten(1), b.flatten(1)

    def magnitude(self, name: str) -> Tensor | None:
        """m [out]; None for LoRA."""
        return self.lora_magnitude_vector[name].flatten() if self.specs[name].use_dora else None

    def norm(self, name: str) -> Tensor:
        """‖W + sBA‖ [out] in fp32; inside `weights_fixed` it is computed once."""
        a, b = (None if f is None else f.detach() for f in self.factors(name))
        return norm_cache.norm(self.matrix().detach(), a, b, self.specs[name].scale, self.keys[name])

    def gain(self, name: str) -> Tensor:
        """g = m / ‖W + sBA‖ [out] in fp32, by which the adapter scales the output; its gradient reaches m alone."""
        magnitude = self.magnitude(name)
        assert magnitude is not None
        return dora_gain(magnitude, self.norm(name))

    @torch.no_grad()
    def fresh_norm(self, name: str) -> Tensor:
        """‖W + sBA‖ now: also the magnitude with which DoRA computes what this LoRA computes."""
        with gathered([self.weight, *self.adapter_tensors(name).values()]):
            return dora_norm(self.matrix(), *self.factors(name), self.specs[name].scale)

    @torch.no_grad()
    def merged(self, name: str) -> Tensor:
        """W' [out, in] in fp32."""
        a, b = self.factors(name)
        return merged_weight(self.matrix(), a, b, self.specs[name].scale, self.magnitude(name))

    # Becoming a plain layer again

    def merge(self, name: str) -> None:
        """Become a plain layer with the adapter folded into its weight."""
        weight = self.from_matrix(self.merged(name)).to(self.weight.dtype)
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.unwrap()

    def unwrap(self) -> None:
        """Become the plain base layer again."""
        for attribute in (*self.low_rank, "vera", "vera_lambda_d", "vera_lambda_b", "lora_magnitude_vector"):
            self._modules.pop(attribute, None)
        for attribute in ("specs", "keys", "active", "rows"):
            self.__dict__.pop(attribute, None)
        become(self, self.__dict__.pop("base_class"))

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterLayer:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        new.keys = {name: norm_cache.new_key() for name in self.keys}  # its norms are its own
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.keys = {name: norm_cache.new_key() for name in self.keys}

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{n}: r={s.rank}{' dora' if s.use_dora else ''}" for n, s in self.specs.items())
        return f"{super().extra_repr()}, adapters=({adapters}), active={self.active}"


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    if "_old_forward" in module.__dict__:  # accelerate's hook wraps the forward that it found
        module.__dict__["_old_forward"] = kind.forward.__get__(module)
