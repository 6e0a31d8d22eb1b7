"""The base class of all layers with adapters.

A module becomes an adapter layer in place, by a change of its class. So every reference to it stays valid (layers used
twice, tied weights, hooks), and its own parameters keep their names in the state dict. A subclass defines how its
frozen weight is read as a matrix [out, in]; the mathematics on that matrix is here.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmdora.adapters.layers.autocast import no_autocast
from mmdora.adapters.ops import norm_cache
from mmdora.adapters.ops.functional import dora_gain, dora_norm, merged_weight
from mmdora.adapters.spec import LowRankSpec
from mmdora.core.deepspeed import gathered
from mmdora.core.errors import UserError
from mmdora.core.sharding import is_split, placement, whole_parameters, whole_tensor

Shape = tuple[int, ...]


class Shapes(NamedTuple):
    """The shapes of an adapter's tensors."""

    a: Shape
    b: Shape
    magnitude: Shape


class SharedVeRA(nn.Module):
    """VeRA's two random, frozen matrices (arXiv 2310.11454), shared by all layers of a part.

    A layer uses the first `in` columns of A and the first `out` rows of B.
    """

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.register_buffer("vera_A", a, persistent=False)  # [r, widest input]
        self.register_buffer("vera_B", b, persistent=False)  # [widest output, r]


class AdapterLayer(nn.Module, ABC):
    """A layer with a frozen weight and named adapters, whose parameters are `lora_A.<name>`, `lora_B.<name>`, ...

    Attributes:
        specs: The settings of each adapter, by name.
        active: Name of the adapter that the forward pass uses; None for the base layer.
        row_adapters: One adapter name (or None) for each row of the batch, if the rows use different adapters.
    """

    low_rank: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")  # attributes that hold A and B
    file_suffix: ClassVar[str] = ".weight"  # suffix of A and B in PEFT's files
    takes_dropout: ClassVar[bool] = True  # whether the layer has a floating-point input
    in_peft: bool = True  # whether PEFT computes the same output from the same tensors

    weight: Any
    bias: Any
    vera: Any  # dictionaries by adapter name, which exist as soon as an adapter needs them
    vera_lambda_d: Any
    vera_lambda_b: Any
    lora_magnitude_vector: Any
    base_class: type[nn.Module]
    path: str = "an adapter layer"  # the layer's path in the model
    specs: dict[str, LowRankSpec]
    norm_keys: dict[str, int]  # keys in the norm cache, by adapter name
    active: str | None
    row_adapters: Sequence[str | None] | None

    @staticmethod
    @abstractmethod
    def shapes(module: nn.Module, rank: int) -> Shapes:
        """Return the shapes of an adapter's tensors on a module of this kind, plain or adapted."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return the frozen weight as [out, in]; DoRA's norm is over its rows."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return a matrix [out, in] in the shape of this layer's weight."""

    @abstractmethod
    def adapted(self, x: Tensor, name: str) -> Tensor:
        """Return the layer's output with the adapter `name`."""

    def adopt(self) -> None:
        """Set up a module whose class has just been changed to this one."""
        self.specs, self.norm_keys, self.active, self.row_adapters = {}, {}, None, None

    def forward(self, x: Tensor) -> Tensor:
        if self.row_adapters is not None:
            return self._row_by_row(x, self.row_adapters)
        return self._output(x, self.active)

    def _output(self, x: Tensor, name: str | None) -> Tensor:
        if name is None or name not in self.specs:
            return self.plain(x)
        if is_split(x) or is_split(self.weight):
            raise self.split_error(x)
        self.check_frozen()
        return self.adapted(x, name)

    def split_error(self, x: Tensor) -> UserError:
        """Return the error for a weight or an input that is a DTensor while the layer computes."""
        refused = "adapters do not support tensor parallelism (parallelize_module, tp_plan)"
        if not is_split(self.weight):
            return UserError(f"{self.path} has adapters, and its input is a DTensor ({placement(x)}): {refused}")
        return UserError(
            f"{self.path} has adapters, and was called while its weight is split ({placement(self.weight)}). Under "
            f"fully_shard, call the model that was given to fully_shard, not a module inside of it; {refused}"
        )

    def check_frozen(self) -> None:
        """Raise UserError if the layer's own weight or bias requires a gradient, which the adapter does not compute."""
        for attribute in ("weight", "bias") if torch.is_grad_enabled() else ():
            tensor = getattr(self, attribute)
            if tensor is not None and tensor.requires_grad:
                raise UserError(
                    f"the {attribute} of {self.path} requires a gradient, but a layer with an adapter has a frozen "
                    f"{attribute}: call requires_grad_(False) on it, or train the layer in full, without an adapter"
                )

    def plain(self, x: Tensor) -> Tensor:
        """Return the base layer's output."""
        return self.base_class.forward(self, x)

    def _row_by_row(self, x: Tensor, names: Sequence[str | None]) -> Tensor:
        if x.shape[0] != len(names):
            raise ValueError(f"adapters_by_row names {len(names)} adapters, but the batch has {x.shape[0]} rows")
        out: Tensor | None = None
        for name in dict.fromkeys(names):
            index = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
            part = self._output(x[index], name)
            out = part.new_empty(len(names), *part.shape[1:]) if out is None else out
            out = out.index_copy(0, index, part)
        assert out is not None
        return out

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter. Raises UserError for `parallelize_module`, which replaces parameters by DTensors."""
        if is_split(param) and not is_split(self._parameters.get(name)):  # fully_shard does not register parameters
            raise UserError(
                f"{self.path} has adapters, and was given to parallelize_module ({placement(param)}): adapters do not "
                "support tensor parallelism; shard the model with fully_shard or train it under ZeRO"
            )
        super().register_parameter(name, param)

    # Adapters and their parameters

    def add_adapter(self, name: str, spec: LowRankSpec, seed: int = 0, shared: SharedVeRA | None = None) -> None:
        """Add an adapter that does not change the layer's output yet, and make it the active one.

        All parameters are in fp32, since small updates of a bf16 magnitude would round to zero. `seed` determines the
        random initialization; `shared` is needed for VeRA only.
        """
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
            # A generator of its own on the CPU gives the same values on every device and in every process.
            self.initialize(a, b, torch.Generator().manual_seed(seed))
            self._put(self.low_rank[0], name, nn.Parameter(a.to(device)))
            self._put(self.low_rank[1], name, nn.Parameter(b))
        if spec.use_dora:
            with gathered([self.weight]):
                norm = dora_norm(self.matrix(), None, None, 1.0).float()
            self._put("lora_magnitude_vector", name, nn.Parameter(norm.view(shapes.magnitude)))
        self.specs[name], self.norm_keys[name] = spec, norm_cache.new_key()
        self.active = name

    def initialize(self, a: Tensor, b: Tensor, generator: torch.Generator) -> None:
        """Initialize A Kaiming-uniform; B stays zero."""
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)

    def _put(self, attribute: str, name: str, value: Any) -> None:
        if not hasattr(self, attribute):
            setattr(self, attribute, nn.ModuleDict() if isinstance(value, nn.Module) else nn.ParameterDict())
        getattr(self, attribute)[name] = value

    def remove_adapter(self, name: str) -> None:
        """Delete an adapter and its parameters. Raises KeyError if the layer does not have it."""
        for attribute in (*self.low_rank, "vera", "vera_lambda_d", "vera_lambda_b", "lora_magnitude_vector"):
            by_name = getattr(self, attribute, {})
            if name in by_name:
                del by_name[name]
        del self.specs[name], self.norm_keys[name]
        self.active = None if self.active == name else self.active

    @classmethod
    def named_shapes(cls, shapes: Shapes, spec: LowRankSpec) -> dict[str, Shape]:
        """Return the shapes of an adapter's tensors by their names in PEFT's files."""
        named: dict[str, Shape] = {}
        if spec.use_vera:
            named |= {"vera_lambda_d": (spec.rank,), "vera_lambda_b": shapes.b[:1]}
        elif spec.rank:
            named |= {f"{n}{cls.file_suffix}": s for n, s in zip(cls.low_rank, (shapes.a, shapes.b), strict=True)}
        return named | ({"lora_magnitude_vector": shapes.magnitude} if spec.use_dora else {})

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by their names in PEFT's files: `lora_A.weight`, ..."""
        spec = self.specs[name]
        names = self.named_shapes(self.shapes(self, spec.rank), spec)
        return {n: getattr(self, n.removesuffix(self.file_suffix))[name] for n in names}

    # The mathematics: W' = g ⊙ (W + sBA), on matrices

    def factors(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Return A [r, in] and B [out, r], or (None, None) if only the magnitude is trained.

        For VeRA these are Λd A and Λb B, with the trained diagonals d [r] and b [out].
        """
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
        """Return m [out]; None for LoRA."""
        return self.lora_magnitude_vector[name].flatten() if self.specs[name].use_dora else None

    def norm(self, name: str) -> Tensor:
        """Return ‖W + sBA‖ [out] in fp32, detached. Inside `weights_fixed` it is computed once.

        For a sharded model, outside its forward pass, the weights are gathered for it. The result is not cached, since
        the forward pass may use weights of another dtype.
        """
        if is_split(self.weight):
            return self.fresh_norm(name)
        a, b = (None if f is None else f.detach() for f in self.factors(name))
        return norm_cache.norm(self.matrix().detach(), a, b, self.specs[name].scale, self.norm_keys[name])

    def gain(self, name: str) -> Tensor:
        """Return g = m / ‖W + sBA‖ [out] in fp32, which scales the output. Only m receives its gradient."""
        magnitude = self.magnitude(name)
        assert magnitude is not None
        return dora_gain(whole_tensor(magnitude) if is_split(magnitude) else magnitude, self.norm(name))

    def holders(self) -> list[nn.Module]:
        """Return the modules that hold the weight and the adapters' parameters."""
        return list(self.modules())

    @torch.no_grad()
    def fresh_norm(self, name: str) -> Tensor:
        """Return the current ‖W + sBA‖ [out], never cached.

        It is also the magnitude with which a DoRA layer computes the same as this LoRA layer.
        """
        with gathered([self.weight, *self.adapter_tensors(name).values()]), whole_parameters(self.holders()):
            return dora_norm(self.matrix(), *self.factors(name), self.specs[name].scale)

    @torch.no_grad()
    def merged(self, name: str) -> Tensor:
        """Return W' [out, in] in fp32, also under autocast."""
        with whole_parameters(self.holders()), no_autocast(self.weight.device.type):
            a, b = self.factors(name)
            return merged_weight(self.matrix(), a, b, self.specs[name].scale, self.magnitude(name))

    @property
    def weight_holder(self) -> tuple[nn.Module, str]:
        """The module whose parameter the frozen weight is, and the parameter's name in it."""
        return self, "weight"

    def merged_weight(self, name: str) -> Tensor:
        """Return W' in the shape and dtype of the layer's weight."""
        return self.from_matrix(self.merged(name)).to(self.weight.dtype).contiguous()

    # Back to a plain layer

    def merge(self, name: str) -> None:
        """Become a plain layer whose weight is W' of the adapter `name`."""
        module, parameter = self.weight_holder
        module._parameters[parameter] = nn.Parameter(self.merged_weight(name), requires_grad=False)
        self.unwrap()

    def unwrap(self) -> None:
        """Become the plain base layer again, without adapters."""
        for attribute in (*self.low_rank, "vera", "vera_lambda_d", "vera_lambda_b", "lora_magnitude_vector"):
            self._modules.pop(attribute, None)
        for attribute in ("path", "specs", "norm_keys", "active", "row_adapters"):
            self.__dict__.pop(attribute, None)
        change_class(self, self.__dict__.pop("base_class"))

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterLayer:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        new.norm_keys = {name: norm_cache.new_key() for name in self.norm_keys}  # the copy's norms are its own
        return new

    def _replicate_for_data_parallel(self) -> AdapterLayer:
        """Return a replica for `nn.DataParallel`, whose norms are on another device."""
        replica = super()._replicate_for_data_parallel()
        replica.norm_keys = {name: norm_cache.new_key() for name in self.norm_keys}
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.norm_keys = {name: norm_cache.new_key() for name in self.norm_keys}

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{n}: r={s.rank}{' dora' if s.use_dora else ''}" for n, s in self.specs.items())
        return f"{super().extra_repr()}, adapters=({adapters}), active={self.active}"


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Change the class of a module in place, also under a hook of accelerate's (`device_map`)."""
    module.__class__ = new
    if "_old_forward" in module.__dict__:  # accelerate's hook replaces `forward` and calls the one it had found
        module.__dict__["_old_forward"] = new.forward.__get__(module)
