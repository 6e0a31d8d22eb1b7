"""Layers that read the same tensor, as q, k and v do, or gate and up: one call computes them all.

Who reads what is written in the parent's `forward`: children that it calls one after another, on one variable that
nothing changes in between. So nothing depends on what a run happens to see first, and whoever calls a layer from
elsewhere gets that layer alone.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmdora.adapters.layers.linear import LinearLayer, linear_outputs
from mmdora.core.deepspeed import is_partitioned

CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def share_reads(model: nn.Module) -> None:
    """Let the adapted layers of every parent work together where its `forward` calls them on one variable."""
    for parent in list(model.modules()):
        for names in same_reads(type(parent)):  # type: ignore[arg-type]  # mypy: a class is not hashable
            children = [getattr(parent, name, None) for name in names]
            layers = [child for child in children if isinstance(child, LinearLayer)]
            if len({id(layer) for layer in layers}) == len(layers) > 1:
                Siblings.unite(parent, layers)


class Siblings:
    """Layers that one parent calls on one tensor. The first that is called computes the outputs of all, which the
    others hand out; only inside the parent's forward pass, and only where gradients are wanted."""

    def __init__(self, parent: nn.Module, layers: list[LinearLayer]):
        self.layers = layers
        self.inside = False
        self.held: tuple[Tensor, dict[int, Tensor]] | None = None  # the x, and outputs by place in `layers`
        self.hooks = [
            parent.register_forward_pre_hook(self._begin),
            parent.register_forward_hook(self._end, always_call=True),
        ]

    @classmethod
    def unite(cls, parent: nn.Module, layers: list[LinearLayer]) -> None:
        before = [layer.siblings for layer in layers]
        if before[0] is not None and before[0].layers == layers:
            return
        for group in before:
            if group is not None:
                group.part()
        together = cls(parent, layers)
        for layer in layers:
            layer.siblings = together

    def part(self) -> None:
        """Every layer works alone again."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            layer.__dict__.pop("siblings", None)
        self.layers = []

    def output(self, layer: LinearLayer, x: Tensor) -> Tensor | None:
        """The layer's output for x; None where it must work alone."""
        if not self.inside or not torch.is_grad_enabled() or layer.active is None:
            return None
        held = self.held
        if held is None:
            places = [i for i, each in enumerate(self.layers) if _can_share(each, layer.active, x)]
            if len(places) < 2:
                return None
            outputs = linear_outputs([self.layers[i] for i in places], x, layer.active)
            held = self.held = (x, dict(zip(places, outputs, strict=True)))
        place = next(i for i, each in enumerate(self.layers) if each is layer)
        if held[0] is not x or place not in held[1]:
            return None
        output = held[1].pop(place)
        if not held[1]:
            self.held = None
        return output

    def _begin(self, *_: Any) -> None:
        self.inside, self.held = True, None

    def _end(self, *_: Any) -> None:
        self.inside, self.held = False, None


def _can_share(layer: LinearLayer, name: str, x: Tensor) -> bool:
    """Not where rows have adapters of their own, another adapter is active, dropout is PEFT's, or the weight comes
    only when the layer itself is called (ZeRO-3, offloading)."""
    if layer.active != name or layer.rows is not None or name not in layer.specs:
        return False
    spec, weight = layer.specs[name], layer.weight
    peft_drops = spec.dropout and layer.training and spec.peft_dropout
    return not peft_drops and weight.device == x.device and not is_partitioned(weight)


@cache
def same_reads(kind: Any) -> tuple[tuple[str, ...], ...]:
    """Names of children that the class's `forward` calls on one and the same variable, one after another.

    Calls count where they are sure to happen together: in the same block, with no branch between them.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):  # no source, as with classes made at run time
        return ()
    found = [names for block in _blocks(tree) for names in _in_block(block)]
    calls = [name for names in found for name in names]
    return tuple(names for names in found if all(calls.count(name) == 1 for name in names))


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def _in_block(block: list[ast.stmt]) -> Iterator[tuple[str, ...]]:
    """The groups in one block; what changes a variable ends its group, and a compound statement ends all."""
    groups: dict[str, list[str]] = {}
    for statement in block:
        if hasattr(statement, "body") or isinstance(statement, ast.Match):
            yield from map(tuple, groups.values())
            groups = {}
            continue
        for call in _sure_calls(statement):
            match call:
                case ast.Call(ast.Attribute(ast.Name("self"), name), [ast.Name(variable)], []):
                    groups.setdefault(variable, []).append(name)
        for variable in _changed(statement):
            if variable in groups:
                yield tuple(groups.pop(variable))
    yield from map(tuple, groups.values())


def _sure_calls(node: ast.AST) -> Iterator[ast.Call]:
    """Calls in a statement that happen whenever it runs."""
    if isinstance(node, CONDITIONAL):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _sure_calls(child)


def _changed(statement: ast.stmt) -> Iterator[str]:
    """Variables that a statement binds, stores into, or calls a method of that works in place (`x.add_`)."""
    for node in ast.walk(statement):
        match node:
            case ast.Name(variable, ast.Store()):
                yield variable
            case ast.Subscript(ast.Name(variable), _, ast.Store()):
                yield variable
            case ast.Call(ast.Attribute(ast.Name(variable), method)) if method.endswith("_"):
                yield variable
