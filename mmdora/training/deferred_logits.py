"""Logits that are not computed until something needs their values.

A model's forward pass receives them from its head. Capping, scaling, casting and slicing are recorded. Cross-entropy is
then computed from the hidden states in chunks of rows (chunked_loss.py). Any other operation computes all logits, so
that every model keeps the loss that transformers defines for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Functions and methods of one tensor that compute each element from itself, Python numbers, and tensors that are the
# same for all rows.
ELEMENTWISE = frozenset(
    ("add", "clamp", "div", "divide", "double", "float", "mul", "multiply", "neg", "sub", "subtract", "tanh", "to")
    + ("__add__", "__mul__", "__neg__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "__sub__", "__truediv__")
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operation:
    """A recorded operation. `inputs` are the tensors among its arguments, which may need gradients."""

    apply: Callable[[Tensor], Tensor]
    inputs: tuple[Tensor, ...] = ()
    to_float32: bool = False  # only a cast, which a fp32 cross-entropy makes superfluous


@dataclass(frozen=True)
class Recipe:
    """How to compute logits [..., width] from hidden states [..., d]: by the head, then the operations."""

    head: Any
    name: str  # of the model
    hidden: Tensor
    width: int
    dtype: torch.dtype
    operations: tuple[Operation, ...] = ()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of some rows [..., d] of the hidden states."""
        value = self.head(hidden)
        for operation in self.operations:
            value = operation.apply(value)
        return value

    def without_last(self) -> Recipe:
        return replace(self, operations=self.operations[:-1])

    def then(self, operation: Operation, **changes: Any) -> Recipe:
        return replace(self, operations=(*self.operations, operation), **changes)


class DeferredLogits:
    """Stands in for a tensor of logits. `value` is that tensor, computed at its first use.

    `cross_entropy` computes `torch.nn.functional.cross_entropy` from a recipe with rows [rows, d] and its arguments. It
    returns None for arguments that it does not support.
    """

    def __init__(self, recipe: Recipe, cross_entropy: Callable[..., Tensor | None]):
        self.recipe, self._cross_entropy = recipe, cross_entropy
        self._value: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.recipe.hidden.shape[:-1], self.recipe.width))

    @property
    def ndim(self) -> int:
        return self.recipe.hidden.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.recipe.dtype

    @property
    def device(self) -> torch.device:
        return self.recipe.hidden.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def _value_for(self, what: str) -> Tensor:
        """Return the logits, all of which `what` needs."""
        if self._value is None:
            if self.recipe.name not in _computed:
                _computed.add(self.recipe.name)
                log.warning(
                    "%s needs all logits for its loss (%s), so the loss takes more memory", self.recipe.name, what
                )
            self._value = self.recipe.logits(self.recipe.hidden)
        return self._value

    def _with(self, recipe: Recipe) -> DeferredLogits:
        return DeferredLogits(recipe, self._cross_entropy)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", str(function))
        own = next((value for value in (*args, *kwargs.values()) if isinstance(value, DeferredLogits)), None)
        if own is not None and own._value is None:
            if function is F.cross_entropy and own is (args[0] if args else kwargs.get("input")):
                rest = {key: value for key, value in kwargs.items() if key != "input"}
                loss = own._cross_entropy(own.recipe, *args[1:], **rest)
                if loss is not None:
                    return loss
            if name in ELEMENTWISE:
                recorded = own._record(function, args, kwargs)
                if recorded is not None:
                    return recorded

        def value_of(item: Any) -> Any:
            if isinstance(item, (list, tuple)):
                return type(item)(value_of(each) for each in item)
            return item._value_for(name) if isinstance(item, DeferredLogits) else item

        return function(*value_of(tuple(args)), **{key: value_of(value) for key, value in kwargs.items()})

    def _record(self, function: Any, args: Any, kwargs: Any) -> DeferredLogits | None:
        """Return the result of an elementwise function; None if it does not treat all rows alike."""
        place = next((i for i, value in enumerate(args) if value is self), None)
        others = [value for i, value in enumerate(args) if i != place] + list(kwargs.values())
        if place is None or any(isinstance(value, DeferredLogits) for value in others):
            return None
        tensors = tuple(value for value in others if isinstance(value, Tensor))
        if any(value.numel() not in (1, value.shape[-1]) or value.ndim > self.ndim for value in tensors if value.ndim):
            return None
        if any(value.ndim and value.shape[-1] not in (1, self.recipe.width) for value in tensors):
            return None
        before = [_per_row(value) for value in args[:place]]
        after = [_per_row(value) for value in args[place + 1 :]]
        named = {key: _per_row(value) for key, value in kwargs.items()}

        def apply(logits: Tensor) -> Tensor:
            return function(*before, logits, *after, **named)

        # The dtype and device of the result come from the function itself.
        example = apply(torch.empty((0, self.recipe.width), dtype=self.dtype, device=self.device))
        if example.device != self.device or not example.is_floating_point():
            return None
        casts = function in (Tensor.to, Tensor.float) and example.dtype == torch.float32
        inputs = tuple(_per_row(value) for value in tensors)
        return self._with(self.recipe.then(Operation(apply, inputs, casts), dtype=example.dtype))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        method = getattr(Tensor, name)  # raises AttributeError, as a tensor would
        if self._value is None and name in ELEMENTWISE:
            return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)
        return getattr(self._value_for(name), name)

    # Operations on rows are those on the rows of the hidden states.

    def contiguous(self) -> DeferredLogits:
        return self

    def view(self, *shape: Any) -> Any:
        return self.reshape(*shape)

    def reshape(self, *shape: Any) -> Any:
        if self._value is None:
            *rows, last = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            hidden, width = self.recipe.hidden, self.recipe.width
            if last == width or (last == -1 and math.prod(rows) * hidden.shape[-1] == hidden.numel()):
                return self._with(replace(self.recipe, hidden=hidden.reshape(*rows, hidden.shape[-1])))
        return self._value_for("reshape").reshape(*shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        if self._value is None and end_dim % self.ndim < self.ndim - 1:
            return self._with(replace(self.recipe, hidden=self.recipe.hidden.flatten(start_dim, end_dim)))
        return self._value_for("flatten").flatten(start_dim, end_dim)

    def __getitem__(self, key: Any) -> Any:
        split = _split_key(key, self.ndim)
        if self._value is None and split is not None:
            rows, last = split
            recipe = replace(self.recipe, hidden=self.recipe.hidden[rows]) if rows else self.recipe
            if last is None:
                return self._with(recipe)
            width = len(range(self.recipe.width)[last])
            return self._with(recipe.then(Operation(lambda logits: logits[..., last]), width=width))
        return self._value_for("indexing")[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        every_row = isinstance(key, tuple) and all(k is Ellipsis or k == slice(None) for k in key[:-1])
        columns = key[-1] if every_row and (Ellipsis in key[:-1] or len(key) == self.ndim) else None
        if self._value is None and isinstance(columns, (list, Tensor)) and isinstance(value, (int, float)):
            index = torch.as_tensor(columns, device=self.device)

            def fill(logits: Tensor) -> Tensor:
                logits = logits.clone()
                logits[..., index] = value
                return logits

            self.recipe = self.recipe.then(Operation(fill))
        else:
            self._value_for("assignment")[key] = value

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._value_for("iteration"))


_computed: set[str] = set()  # names of the models whose logits all had to be computed; each is logged once


def _per_row(value: Any) -> Any:
    """Return a tensor that is the same for all rows as [width], or as a scalar."""
    return value.reshape(-1) if isinstance(value, Tensor) and value.ndim > 1 else value


def _split_key(key: Any, ndim: int) -> tuple[tuple[Any, ...], slice | None] | None:
    """Split an index into that of the rows and a slice of the last dimension, which is None for all of it.

    Returns None for an index that cannot be split.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(k is None or isinstance(k, (bool, list)) for k in keys):
        return None
    used = sum(k.ndim if isinstance(k, Tensor) and k.dtype == torch.bool else k is not Ellipsis for k in keys)
    places = [i for i, k in enumerate(keys) if k is Ellipsis]
    if len(places) > 1 or used > ndim:
        return None
    missing = [slice(None)] * (ndim - used)
    place = places[0] if places else len(keys)
    keys[place : place + 1] = missing
    last = keys[-1]
    if isinstance(last, Tensor) and last.dtype == torch.bool and last.ndim > 1:
        return None
    if not isinstance(last, slice):
        return None
    return tuple(keys[:-1]), None if last == slice(None) else last


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def operator(self: DeferredLogits, *others: Any) -> Any:
        return DeferredLogits.__torch_function__(function, (), (self, *others))

    return operator


for _name in ("add", "mul", "sub", "truediv", "radd", "rmul", "rsub", "rtruediv", "neg"):
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))
