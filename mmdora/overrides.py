"""`section.key=value` from the command line, set in a tree of plain values before it is validated."""

from __future__ import annotations

from typing import Any

import yaml

from mmdora.errors import UserError


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key; list items go by index, values are YAML. Raises UserError that quotes the override."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write section.key=value")
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str) and _is_number(value):
            value = float(value)  # YAML 1.1 reads 2e-4 (without a point) as a string
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML ({error})") from error
    *path, last = key.split(".")
    node: Any = tree
    for step in path:
        node = _descend(node, step, override)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.lower().strip("+-") not in ("nan", "inf", "infinity")


def _descend(node: Any, step: str, override: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, step, override)]
    else:
        if node.get(step) is None:
            node[step] = {}
        child = node[step]
    if not isinstance(child, dict | list):
        raise UserError(f"{override!r}: {step!r} is a value ({child!r}), not a section")
    return child


def _index(items: list[Any], step: str, override: str) -> int:
    if not step.isdigit() or int(step) >= len(items):
        raise UserError(f"{override!r}: {step!r} is not an index into a list of {len(items)}")
    return int(step)
