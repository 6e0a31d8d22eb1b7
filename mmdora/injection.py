"""`inject_adapters`: give every part of a model its method, and report what was adapted and what was not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from torch import nn

from mmdora.adapters import ADAPTERS, AdapterLayer, adapter_layers
from mmdora.architectures import architecture_of, find_part, unused_blocks
from mmdora.attention import explicit_attention
from mmdora.config import PartConfig
from mmdora.errors import UserError
from mmdora.zero import numel


@dataclass(frozen=True)
class PartReport:
    """What one entry of `parts` did. Parameters are counted, not bytes."""

    name: str
    path: str
    method: str
    modules: list[str]  # full paths of the modules adapted
    skipped: list[str]  # linear layers of the part that were not
    trainable: int
    total: int


@dataclass(frozen=True)
class InjectionReport:
    parts: list[PartReport]
    trainable: int
    total: int  # adapters included

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


@dataclass(frozen=True)
class AdapterRecord:
    """What the model remembers of one named adapter, beside the tensors in its layers."""

    parts: dict[str, PartConfig]
    whole: list[str] = field(default_factory=list)  # paths of the modules that are trained in full


def records(model: nn.Module) -> dict[str, AdapterRecord]:
    """The model's adapters by name; kept on the model, since adapters belong to it alone."""
    if "_mmdora_adapters" not in model.__dict__:
        model.__dict__["_mmdora_adapters"] = {}
    return model.__dict__["_mmdora_adapters"]


def inject_adapters(
    model: nn.Module, parts: Mapping[str, PartConfig | Mapping[str, Any]], name: str = "default"
) -> InjectionReport:
    """Adapt the parts of `model` in place; everything that is not named is frozen.

    `parts` maps a part (`vision`, `projector`, `language`, `lm_head`, a dotted module path, or `""` for the root) to
    its settings, as in a run's YAML. The model computes what it computed before, until it is trained. Raises
    UserError for a part, method or target that does not exist; nothing is then adapted or frozen.
    """
    configs = {part: _part_config(part, value) for part, value in parts.items()}
    if name in records(model):
        raise UserError(f"the model already has an adapter named {name!r}; give the new one another name")
    paths, targets = resolve_parts(model, configs)
    model.requires_grad_(False)
    whole = []
    for part, config in configs.items():
        changed = ADAPTERS[config.method]().adapt(model, paths[part], targets.get(part, []), config, name)
        whole += changed if part not in targets else []
    records(model)[name] = AdapterRecord(configs, whole)
    return _report(model, configs, paths, targets, name)


def resolve_parts(model: nn.Module, configs: Mapping[str, PartConfig]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The path of every part, and of the layers to adapt in those whose method takes targets.

    Nothing is adapted yet, so that a mistake can be told before a long evaluation of the base model; but attention
    that hides its layers is made explicit, which does not change what it computes. Raises UserError.
    """
    paths = {part: find_part(model, part) for part in configs}
    targets: dict[str, list[str]] = {}
    for part, config in configs.items():
        if ADAPTERS[config.method].takes_targets:
            _explicit(model, paths[part])
            targets[part] = resolve_targets(model, part, paths[part], config.targets)
    _check_disjoint(targets)
    return paths, targets


def resolve_targets(model: nn.Module, part: str, part_path: str, targets: str | list[str]) -> list[str]:
    """Full paths of the layers that `targets` names inside the part.

    `all-linear`; a regular expression over the path inside the part; or names that match as dotted suffixes inside
    it. Blocks of a vision encoder whose output nothing reads are left out.
    """
    unused = unused_blocks(model, part_path) if architecture_of(model).resolve(model).get("vision") == part_path else []
    inside = {
        path: module
        for path, module in model.get_submodule(part_path).named_modules()
        if path and not any(_join(part_path, path).startswith(f"{block}.") for block in unused)
    }
    if targets == "all-linear":
        # Left out of the root's, as in PEFT: the output embedding, which is often tied to the input's.
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = [p for p, m in inside.items() if isinstance(m, nn.Linear) and m is not head]
        if not found and isinstance(model.get_submodule(part_path), nn.Linear):
            return [part_path]
    elif isinstance(targets, str):
        try:
            found = [p for p in inside if re.fullmatch(targets, p)]
        except re.error as error:
            raise UserError(f"parts.{part}.targets: {targets!r} is not a regular expression ({error})") from error
    else:
        found = [p for p in inside if any(p == t or p.endswith(f".{t}") for t in targets)]
        idle = [t for t in targets if not any(p == t or p.endswith(f".{t}") for p in inside)]
        if idle:
            raise UserError(f"parts.{part}.targets: nothing in the part is named {idle[0]!r}. {_examples(inside)}")
    if not found:
        raise UserError(f"parts.{part}.targets: {targets!r} matches no layer of the part. {_examples(inside)}")
    return [_join(part_path, p) for p in found]


def set_adapter(model: nn.Module, name: str) -> None:
    """Make `name` the adapter that the model computes with. Raises UserError for a name that it does not have."""
    if name not in records(model):
        raise UserError(f"the model has no adapter {name!r}; it has: {', '.join(records(model)) or 'none'}")
    for _, layer in adapter_layers(model):
        layer.active = name if name in layer.specs else None


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes without its low-rank adapters (weights trained in full stay as trained)."""
    layers: list[AdapterLayer] = [layer for _, layer in adapter_layers(model)]
    active = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = None
        yield
    finally:
        for layer, name in zip(layers, active, strict=True):
            layer.active = name


def _part_config(part: str, value: PartConfig | Mapping[str, Any]) -> PartConfig:
    if not isinstance(value, PartConfig):
        try:
            value = PartConfig.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(step) for step in ("parts", part, *first["loc"]))
            raise UserError(f"{key}: {first['msg']}") from None
    try:
        ADAPTERS[value.method]
    except UserError as error:
        raise UserError(f"parts.{part}.method: {error}") from None
    return value


def _explicit(model: nn.Module, path: str) -> None:
    """`nn.MultiheadAttention` inside the part becomes explicit, so that its q, k, v and out are layers."""
    module = model.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        raise UserError(f"{path!r} is itself an nn.MultiheadAttention; name the module around it")
    explicit_attention(module)


def _check_disjoint(targets: dict[str, list[str]]) -> None:
    owner: dict[str, str] = {}
    for part, paths in targets.items():
        for path in paths:
            if path in owner:
                raise UserError(f"parts.{owner[path]} and parts.{part} both adapt {path}; narrow one's targets")
            owner[path] = part


def _report(
    model: nn.Module,
    configs: dict[str, PartConfig],
    paths: dict[str, str],
    targets: dict[str, list[str]],
    name: str,
) -> InjectionReport:
    reports = []
    for part, config in configs.items():
        module = model.get_submodule(paths[part])
        linear = [_join(paths[part], p) for p, m in module.named_modules() if isinstance(m, nn.Linear)]
        chosen = targets.get(part, [paths[part]] if config.method == "full" else [])
        covered = set(chosen) if part in targets else set(linear if config.method == "full" else [])
        trainable = sum(numel(p) for p in module.parameters() if p.requires_grad)
        total = sum(numel(p) for p in module.parameters())
        skipped = [p for p in linear if p not in covered]
        reports.append(PartReport(part, paths[part], config.method, chosen, skipped, trainable, total))
    parameters = list(model.parameters())
    return InjectionReport(
        reports, sum(numel(p) for p in parameters if p.requires_grad), sum(numel(p) for p in parameters)
    )


def _examples(inside: dict[str, nn.Module]) -> str:
    names = sorted({p.rpartition(".")[2] for p, m in inside.items() if isinstance(m, nn.Linear)})
    return f"Its linear layers are named: {', '.join(names)}"


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path
