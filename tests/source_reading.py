"""Read from a class's source code which of its layers are called on the same tensor."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LINEAR = re.compile(r"self\.(\w+)(?:: [^=\n]+)? = (?:nn\.Linear|Conv1D)\(")


def groups_in_file(path: Path) -> dict[str, list[tuple[str, ...]]]:
    """Return, by class, the names of linear layers that its `forward` calls on one variable, one call after another."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    # Splitting at the classes and parsing only those with two linear layers is five times as fast as parsing the file.
    for source in re.split(r"^(?=@|class )", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        linear = set(LINEAR.findall(source))
        if not source.startswith("class ") or len(linear) < 2:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and (own := groups_in_class(node, linear)):
                groups[node.name] = own
    return groups


def groups_in_class(node: ast.ClassDef, linear: set[str]) -> list[tuple[str, ...]]:
    """Return the groups of two or more of these layers. A layer that is called more than once is in none."""
    forward = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "forward"), None)
    if forward is None:
        return []
    groups = [names for block in _blocks(forward) for names in _in_block(block)]
    calls = [name for names in groups for name in names]
    once = [tuple(name for name in names if name in linear and calls.count(name) == 1) for names in groups]
    return [names for names in once if len(names) > 1]


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def _in_block(block: list[ast.stmt]) -> Iterator[tuple[str, ...]]:
    """Yield the groups in one block. A change of the variable ends its group; a compound statement ends all."""
    groups: dict[str, list[str]] = {}
    for statement in block:
        if hasattr(statement, "body") or isinstance(statement, ast.Match):
            yield from map(tuple, groups.values())
            groups = {}
            continue
        for call in _unconditional_calls(statement):
            match call:
                case ast.Call(ast.Attribute(ast.Name("self"), name), [ast.Name(variable)], []):
                    groups.setdefault(variable, []).append(name)
        for variable in _changed(statement):
            if variable in groups:
                yield tuple(groups.pop(variable))
    yield from map(tuple, groups.values())


def _unconditional_calls(node: ast.AST) -> Iterator[ast.Call]:
    if isinstance(node, CONDITIONAL):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _unconditional_calls(child)


def _changed(statement: ast.stmt) -> Iterator[str]:
    """Yield the variables that a statement assigns, stores into, or calls an in-place method of (`x.add_`)."""
    for node in ast.walk(statement):
        match node:
            case ast.Name(variable, ast.Store()):
                yield variable
            case ast.Subscript(ast.Name(variable), _, ast.Store()):
                yield variable
            case ast.Call(ast.Attribute(ast.Name(variable), method)) if method.endswith("_"):
                yield variable
