"""Which layers of a part `targets`, `exclude` and the patterns of a config mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mmdora.adapters.layers.base import AdapterLayer
from mmdora.adapters.layers.experts import expert_parameters
from mmdora.adapters.layers.wrapping import layer_kind
from mmdora.core.config import PartConfig
from mmdora.core.errors import UserError
from mmdora.models.architectures import Region, unused_blocks
from mmdora.models.blocks import last_blocks

Choice = str | list[str]


def resolve_targets(model: nn.Module, part: str, region: Region, config: PartConfig, key: str = "targets") -> list[str]:
    """Full paths of the layers that the config's `key` names inside the part, without what it excludes.

    `all-linear`; a regular expression over the path inside the part; or names that match as dotted suffixes inside
    it. Blocks of a vision encoder whose output nothing reads are left out. Raises UserError for a choice that names
    nothing, or a layer that can have no adapter.
    """
    choice: Choice = getattr(config, key)
    path, inside = region.path, layers_inside(model, region)
    if choice == "all-linear":
        # Left out of the root's, as in PEFT: the output embedding, which is often tied to the input's.
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = [p for p, m in inside.items() if is_linear(m) and m is not head]
        if not found and is_linear(model.get_submodule(path)):
            return [path]
    else:
        found = _chosen(choice, inside, f"parts.{part}.{key}")
    if config.exclude:
        excluded = set(_chosen(config.exclude, inside, f"parts.{part}.exclude"))
        found = [p for p in found if p not in excluded]
    if config.last_blocks is not None:
        chosen = tuple(f"{block}." for block in last_blocks(model, part, region, config.last_blocks))
        found = [p for p in found if join(path, p).startswith(chosen)]
    if not found:
        raise UserError(f"parts.{part}.{key}: {choice!r} matches no layer of the part. {_examples(inside)}")
    for p in found:
        layer = inside[p]
        if isinstance(layer, nn.Module) and layer_kind(layer) is None:
            kind = type(layer).__name__
            raise UserError(f"parts.{part}.{key}: {join(path, p)} is a {kind}, which can have no low-rank adapter")
    return [join(path, p) for p in found]


def layers_inside(model: nn.Module, region: Region) -> dict[str, nn.Module | nn.Parameter]:
    """Every module of the part, and every parameter that holds the weights of many experts, by path inside the part."""
    unused = unused_blocks(model, region)
    path = region.path
    inside: dict[str, nn.Module | nn.Parameter] = {}
    below: list[str] = []  # what adapters brought
    for p, m in model.get_submodule(path).named_modules():
        if not region.holds(join(path, p)):
            continue
        if p and not any(p.startswith(f"{b}.") for b in below):
            inside[p] = m
            inside |= {f"{p}.{name}": weight for name, weight in expert_parameters(m).items()}
        if isinstance(m, AdapterLayer):
            below.append(p)
    return {p: m for p, m in inside.items() if not any(join(path, p).startswith(f"{block}.") for block in unused)}


def is_linear(module: nn.Module | nn.Parameter) -> bool:
    """What `all-linear` means: `nn.Linear`, quantized or not, and transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "AdaptedConv1D")


def is_weight(module: nn.Module | nn.Parameter) -> bool:
    """What a report counts as a layer that could be tuned: linear layers, and the weights of experts."""
    return isinstance(module, nn.Parameter) or is_linear(module)


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule for `rank_pattern` and `alpha_pattern`: the first that matches the end of the path. Raises
    UserError."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"rank_pattern or alpha_pattern: {pattern!r} is not a regular expression ({error})"
            ) from error
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)), default)


def _chosen(choice: Choice, inside: Mapping[str, object], key: str) -> list[str]:
    if isinstance(choice, str):
        try:
            return [p for p in inside if re.fullmatch(choice, p)]
        except re.error as error:
            raise UserError(f"{key}: {choice!r} is not a regular expression ({error})") from error

    def named(name: str) -> Callable[[str], bool]:
        return lambda p: p == name or p.endswith(f".{name}")

    idle = [name for name in choice if not any(map(named(name), inside))]
    if idle:
        raise UserError(f"{key}: nothing in the part is named {idle[0]!r}. {_examples(inside)}")
    return [p for p in inside if any(named(name)(p) for name in choice)]


def _examples(inside: Mapping[str, Any]) -> str:
    names = sorted({p.rpartition(".")[2] for p, m in inside.items() if is_linear(m)})
    return f"Its linear layers are named: {', '.join(names)}"


def join(prefix: str, path: str) -> str:
    return ".".join(filter(None, (prefix, path)))
