"""Resolve a config's `targets`, `exclude` and patterns to the layers of a part."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mmdora.adapters.layers.base import AdapterLayer
from mmdora.adapters.layers.experts import expert_parameters
from mmdora.adapters.layers.wrapping import is_weight_computed, layer_class
from mmdora.core.config import PartConfig
from mmdora.core.errors import UserError
from mmdora.models.architectures import Region, unused_blocks
from mmdora.models.blocks import last_blocks

Choice = str | list[str]


def resolve_targets(model: nn.Module, part: str, region: Region, config: PartConfig, key: str = "targets") -> list[str]:
    """Return the full paths of the layers that the config's `key` selects in the part, without the excluded ones.

    The value is `all-linear`, a regular expression for the path inside the part, or a list of names that are matched
    as dotted suffixes inside the part. Blocks of a vision encoder whose output is not used are skipped.

    Raises:
        UserError: If nothing is selected, a name matches nothing, or a selected layer cannot have a low-rank adapter.
    """
    choice: Choice = getattr(config, key)
    path, inside = region.path, layers_inside(model, region)
    if choice == "all-linear":
        # PEFT also leaves out the output embeddings, which are often tied to the input embeddings.
        head = getattr(model, "get_output_embeddings", lambda: None)()
        selected = [p for p, m in inside.items() if is_linear(m) and m is not head]
        if not selected and layer_class(model.get_submodule(path)) is not None:
            return [path]  # the part is one layer
    else:
        selected = _select(choice, inside, f"parts.{part}.{key}")
    if config.exclude:
        excluded = set(_select(config.exclude, inside, f"parts.{part}.exclude"))
        selected = [p for p in selected if p not in excluded]
    if config.last_blocks is not None:
        blocks = tuple(f"{block}." for block in last_blocks(model, part, region, config.last_blocks))
        selected = [p for p in selected if join(path, p).startswith(blocks)]
    if not selected:
        raise UserError(f"parts.{part}.{key}: {choice!r} matches no layer of the part. {_examples(inside)}")
    for p in selected:
        layer = inside[p]
        if isinstance(layer, nn.Module) and layer_class(layer) is None:
            reason = ""
            if is_weight_computed(layer):
                reason = ": its weight is computed from other parameters (weight_norm, or a parametrization)"
            raise UserError(
                f"parts.{part}.{key}: {join(path, p)} is a {type(layer).__name__}, which cannot have a low-rank adapter"
                f"{reason}"
            )
    return [join(path, p) for p in selected]


def layers_inside(model: nn.Module, region: Region) -> dict[str, nn.Module | nn.Parameter]:
    """Return every module of the part, and every parameter that holds all experts' weights, by path inside the part."""
    unused = unused_blocks(model, region)
    path = region.path
    inside: dict[str, nn.Module | nn.Parameter] = {}
    adapted: list[str] = []  # paths of adapter layers, whose children belong to the adapters
    for p, m in model.get_submodule(path).named_modules():
        if not region.holds(join(path, p)):
            continue
        if p and not any(p.startswith(f"{b}.") for b in adapted):
            inside[p] = m
            inside |= {f"{p}.{name}": weight for name, weight in expert_parameters(m).items()}
        if isinstance(m, AdapterLayer):
            adapted.append(p)
    return {p: m for p, m in inside.items() if not any(join(path, p).startswith(f"{block}.") for block in unused)}


def is_linear(module: nn.Module | nn.Parameter) -> bool:
    """Return whether `all-linear` selects the module: `nn.Linear`, quantized or not, and transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "AdaptedConv1D")


def is_weight(module: nn.Module | nn.Parameter) -> bool:
    """Return whether a report lists the module as skipped if it is not adapted: linear layers and expert weights."""
    return isinstance(module, nn.Parameter) or is_linear(module)


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the path, as PEFT does for `rank_pattern`.

    Raises UserError for a pattern that is not a regular expression.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"rank_pattern or alpha_pattern: {pattern!r} is not a regular expression ({error})"
            ) from error
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)), default)


def _select(choice: Choice, inside: Mapping[str, object], key: str) -> list[str]:
    if isinstance(choice, str):
        try:
            return [p for p in inside if re.fullmatch(choice, p)]
        except re.error as error:
            raise UserError(f"{key}: {choice!r} is not a regular expression ({error})") from error

    def named(name: str) -> Callable[[str], bool]:
        return lambda p: p == name or p.endswith(f".{name}")

    unmatched = [name for name in choice if not any(map(named(name), inside))]
    if unmatched:
        raise UserError(f"{key}: nothing in the part is named {unmatched[0]!r}. {_examples(inside)}")
    return [p for p in inside if any(named(name)(p) for name in choice)]


def _examples(inside: Mapping[str, Any]) -> str:
    names = sorted({p.rpartition(".")[2] for p, m in inside.items() if is_linear(m)})
    return f"Its linear layers are named: {', '.join(names)}"


def join(prefix: str, path: str) -> str:
    """Join two dotted paths, either of which may be empty."""
    return ".".join(filter(None, (prefix, path)))
