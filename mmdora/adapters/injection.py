"""`inject_adapters`: give every part of a model its method, and report what was adapted and what was not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from torch import nn

from mmdora.adapters import ADAPTERS, AdapterLayer, adapter_layers
from mmdora.adapters.layers.siblings import share_reads
from mmdora.adapters.methods.base import PartPlan, part_problems
from mmdora.adapters.targets import is_weight, join, layers_inside
from mmdora.core.config import PartConfig
from mmdora.core.deepspeed import numel
from mmdora.core.errors import UserError
from mmdora.models.architectures import Region, architecture_of, find_parts, is_inside
from mmdora.models.attention import explicit_attention
from mmdora.models.new_tokens import NEW_TOKENS, VALUES, fold_rows, token_rows, train_rows


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
    rows: list[str] = field(default_factory=list)  # paths of the tables whose rows for new tokens are trained

    @property
    def owned(self) -> list[str]:
        """Weights of the model itself, of which it has one set."""
        return [*self.whole, *self.rows]


def records(model: nn.Module) -> dict[str, AdapterRecord]:
    """The model's adapters by name; kept on the model, since adapters belong to it alone."""
    if "_mmdora_adapters" not in model.__dict__:
        model.__dict__["_mmdora_adapters"] = {}
    return model.__dict__["_mmdora_adapters"]


def inject_adapters(
    model: nn.Module, parts: Mapping[str, PartConfig | Mapping[str, Any]], name: str = "default"
) -> InjectionReport:
    """Adapt the parts of `model` in place; everything that is not named is frozen, but for the rows of new tokens.

    `parts` maps a part (`vision`, `projector`, `language`, `lm_head`, `embeddings`, a dotted module path, or `""` for
    the root) to its settings, as in a run's YAML. The model computes what it computed before, until it is trained.
    Raises UserError for a part, method or target that does not exist; nothing is then adapted or frozen.
    """
    configs = {part: _part_config(part, value) for part, value in parts.items()}
    check_new_name(model, name)
    regions, plans = resolve_parts(model, configs)
    full = [part for part, plan in plans.items() if plan.whole]
    if full and records(model):
        raise UserError(
            f"parts.{full[0]}: the weights are those of the adapter {next(iter(records(model)))!r} too, so "
            "they cannot be trained in full for another one"
        )
    whole: list[str] = []
    fold_rows(model, [path for plan in plans.values() for path in plan.whole])  # full training trains them too
    model.requires_grad_(False)
    for part, config in configs.items():
        for module in plans[part].whole:
            model.get_submodule(module).requires_grad_(True)
        whole += plans[part].whole
        ADAPTERS[config.method]().apply(model, regions[part], plans[part].layers, name)
    records(model)[name] = AdapterRecord(configs, whole, train_rows(model))
    set_adapter(model, name)
    return _report(model, configs, regions, plans)


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise UserError where the model cannot have another adapter of this name."""
    if name in records(model):
        raise UserError(f"the model already has an adapter named {name!r}; give the new one another name")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ParameterDict, name) or hasattr(nn.ModuleDict(), name):
        raise UserError(
            f"an adapter cannot be named {name!r}: letters, digits, - and _ only, and no name of torch's own"
        )
    trained = [other for other, record in records(model).items() if record.owned]
    if trained:
        raise UserError(
            f"the adapter {trained[0]!r} holds weights of the model itself ({records(model)[trained[0]].owned[0]}), "
            "of which a model has one set: put the second adapter on a base of its own, or swap (swap_adapter)"
        )


def resolve_parts(model: nn.Module, configs: Mapping[str, PartConfig]) -> tuple[dict[str, Region], dict[str, PartPlan]]:
    """Where every part lives, and what becomes of it.

    Nothing is adapted yet, so that a mistake can be told before a long evaluation of the base model; but attention
    that hides its layers is made explicit, which does not change what it computes. Raises UserError.
    """
    regions = find_parts(model, configs)
    plans = {}
    for part, config in configs.items():
        method = ADAPTERS[config.method]()
        if "targets" in method.settings:
            _explicit(model, regions[part])
        plans[part] = method.plan(model, part, regions[part], config)
    _check_disjoint(plans)
    rows = [path for path, _ in token_rows(model)]
    for part, plan in plans.items():
        if both := sorted(set(rows) & set(plan.layers)):
            raise UserError(
                f"parts.{part}: {both[0]} holds rows of new tokens, which a low-rank adapter on the whole table would "
                "change again; leave it out, or train it in full"
            )
    return regions, plans


def set_adapter(model: nn.Module, name: str) -> None:
    """Make `name` the adapter that the model computes with, and the one that is trained. Raises UserError for a name
    that it does not have."""
    _check_names(model, [name])
    for _, layer in adapter_layers(model):
        layer.active = name if name in layer.specs else None
        for other in layer.specs:
            for parameter in layer.adapter_tensors(other).values():
                parameter.requires_grad_(other == name)
    share_reads(model)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes without its low-rank adapters (weights trained in full stay as trained)."""
    before = [(layer, layer.active, layer.rows) for _, layer in adapter_layers(model)]
    try:
        for layer, _, _ in before:
            layer.active = layer.rows = None
        yield
    finally:
        for layer, active, rows in before:
            layer.active, layer.rows = active, rows


@contextmanager
def adapters_by_row(
    model: nn.Module, rows: Sequence[str | None], media: Sequence[str | None] | None = None
) -> Iterator[None]:
    """Inside the block every row of a batch has its own adapter: `rows[i]` names that of row i, None is the base.

    `media` does so for the pictures or frames that reach the vision encoder and the projector, in their order, which
    is that of the placeholders in the rows; needed where these parts are adapted. Raises UserError for a name that the
    model does not have; the forward pass raises ValueError where the number of rows is another.
    """
    _check_names(model, [name for name in (*rows, *(media or ())) if name is not None])
    parts = architecture_of(model).resolve(model)
    seeing = [parts[part] for part in ("vision", "projector") if part in parts]
    before: list[tuple[AdapterLayer, Sequence[str | None] | None]] = []
    try:
        for path, layer in adapter_layers(model):
            sees = any(region.holds(path) for region in seeing)
            if sees and media is None:
                raise UserError(f"{path} is adapted: name the adapter of every picture too (media=[…])")
            before.append((layer, layer.rows))
            layer.rows = media if sees else rows
        yield
    finally:
        for layer, outer in before:
            layer.rows = outer


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if name not in records(model):
            raise UserError(f"the model has no adapter {name!r}; it has: {', '.join(records(model)) or 'none'}")


def _part_config(part: str, value: PartConfig | Mapping[str, Any]) -> PartConfig:
    if not isinstance(value, PartConfig):
        try:
            value = PartConfig.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(step) for step in ("parts", part, *first["loc"]))
            raise UserError(f"{key}: {first['msg']}") from None
    if problems := part_problems(part, value):
        raise UserError(problems[0])
    return value


def _explicit(model: nn.Module, region: Region) -> None:
    """`nn.MultiheadAttention` inside the part becomes explicit, so that its q, k, v and out are layers."""
    for path in region.roots:
        module = model.get_submodule(path)
        if isinstance(module, nn.MultiheadAttention):
            raise UserError(f"{path!r} is itself an nn.MultiheadAttention; name the module around it")
        explicit_attention(module)


def _check_disjoint(plans: dict[str, PartPlan]) -> None:
    owner: dict[str, str] = {}
    for part, plan in plans.items():
        for path in plan.layers:
            if path in owner:
                raise UserError(f"parts.{owner[path]} and parts.{part} both adapt {path}; narrow one's targets")
            owner[path] = part
    for part, plan in plans.items():
        for outside in plan.whole:
            for other, others in plans.items():
                for path in [*others.whole, *others.layers] if other != part else []:
                    if is_inside(path, outside):
                        raise UserError(
                            f"parts.{part} trains {path} in full, and parts.{other} adapts it; leave out one of them"
                        )


def _report(
    model: nn.Module, configs: dict[str, PartConfig], regions: dict[str, Region], plans: dict[str, PartPlan]
) -> InjectionReport:
    reports = []
    for part, config in configs.items():
        region, plan = regions[part], plans[part]
        tuned = [*plan.whole, *plan.layers]
        could = [join(region.path, p) for p, m in layers_inside(model, region).items() if is_weight(m)]
        skipped = [p for p in could if not any(is_inside(p, path) for path in tuned)]
        parameters = [p for n, p in region.named_parameters(model) if not n.endswith(VALUES)]
        trainable = sum(numel(p) for p in parameters if p.requires_grad)
        total = sum(numel(p) for p in parameters)
        reports.append(PartReport(part, region.path, config.method, tuned, skipped, trainable, total))
    paths = [path for path, _ in token_rows(model)]
    if paths:
        values = {id(p): p for n, p in model.named_parameters() if n.endswith(VALUES)}.values()
        tables: list[Any] = [model.get_submodule(path) for path in paths]
        size = sum(numel(weight) for weight in {id(t.weight): t.weight for t in tables}.values())
        reports.append(PartReport(NEW_TOKENS, "", "rows", paths, [], sum(numel(p) for p in values), size))
    parameters = list(model.parameters())
    return InjectionReport(
        reports, sum(numel(p) for p in parameters if p.requires_grad), sum(numel(p) for p in parameters)
    )
