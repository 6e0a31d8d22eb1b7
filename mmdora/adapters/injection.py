"""Put adapters on the parts of a model, and choose which adapter the model uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError
from torch import nn

from mmdora.adapters import ADAPTERS, AdapterLayer, adapter_layers
from mmdora.adapters.layers.shared_input import share_inputs
from mmdora.adapters.methods.base import PartPlan, part_problems
from mmdora.adapters.targets import is_weight, join, layers_inside
from mmdora.core.config import PartConfig
from mmdora.core.deepspeed import numel
from mmdora.core.errors import UserError
from mmdora.core.sharding import check_not_split, reshard
from mmdora.models.architectures import Region, architecture_of, find_parts, is_inside
from mmdora.models.attention import ExplicitAttention, convert_attention, restore_multihead
from mmdora.models.model_state import AdapterRecord, state_of
from mmdora.models.new_tokens import NEW_TOKENS, VALUES, fold_token_rows, token_rows, train_token_rows
from mmdora.models.tied_weights import holder_of, tied_weights, untie, with_tied_modules


@dataclass(frozen=True)
class PartReport:
    """The effect of one entry of `parts`. `trainable` and `total` count parameters."""

    name: str
    path: str
    method: str
    modules: list[str]  # full paths of the adapted modules
    skipped: list[str]  # full paths of the part's linear layers that are not adapted
    trainable: int
    total: int


@dataclass(frozen=True)
class InjectionReport:
    """The effect of `inject_adapters` on the whole model; `trainable` and `total` count parameters."""

    parts: list[PartReport]
    trainable: int
    total: int  # including the adapters

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100 * self.trainable / self.total


def inject_adapters(
    model: nn.Module, parts: Mapping[str, PartConfig | Mapping[str, Any]], name: str = "default"
) -> InjectionReport:
    """Put an adapter on the parts of `model`, in place, and make it the active one.

    All other parameters are frozen, except the rows of new tokens (`add_tokens`). The model's output does not change
    until it is trained. Training one of two tied weights in full trains both, unless the other one has a low-rank
    adapter: then the two are no longer tied.

    Args:
        parts: Settings by part, as in a run's YAML. A part is `vision`, `projector`, `language`, `lm_head`,
            `embeddings`, a dotted module path, or `""` for the root.
        name: Name of the adapter.

    Raises:
        UserError: If a part, method or target does not exist, or if the model is sharded by `fully_shard` or split by
            tensor parallelism already. The model is then unchanged.
    """
    check_not_split(model, "inject_adapters", "call inject_adapters before fully_shard")
    configs = {part: _part_config(part, value) for part, value in parts.items()}
    check_new_name(model, name)
    regions, plans = resolve_parts(model, configs)
    full = [part for part, plan in plans.items() if plan.whole]
    adapters = state_of(model).adapters
    if full and adapters:
        raise UserError(
            f"parts.{full[0]}: cannot be trained in full, since the adapter {next(iter(adapters))!r} uses the same "
            "base weights; put this adapter on a base model of its own"
        )
    whole = [path for plan in plans.values() for path in plan.whole]
    _untie_adapted(model, whole, [path for plan in plans.values() for path in plan.layers])
    # Full training of a table trains the rows of new tokens too.
    fold_token_rows(model, whole)
    model.requires_grad_(False)
    for part, config in configs.items():
        for module in plans[part].whole:
            model.get_submodule(module).requires_grad_(True)
        ADAPTERS[config.method]().apply(model, regions[part], plans[part].layers, name)
    adapters[name] = AdapterRecord(configs, with_tied_modules(model, whole), train_token_rows(model))
    set_adapter(model, name)
    return _report(model, configs, regions, plans)


def check_not_merged(model: nn.Module) -> None:
    """Raise UserError inside `merged_weights`, where the frozen weights are not those that the adapters belong to."""
    if state_of(model).holds_merged:
        raise UserError(
            "inside merged_weights, adapters cannot be changed, switched, merged or saved; leave the block first"
        )


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise UserError if the model cannot have another adapter of this name."""
    check_not_merged(model)
    adapters = state_of(model).adapters
    if name in adapters:
        raise UserError(f"the model already has an adapter named {name!r}; give the new one another name")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ParameterDict, name) or hasattr(nn.ModuleDict(), name):
        raise UserError(
            f"an adapter cannot be named {name!r}; use letters, digits, - and _, and no name of a method of torch"
        )
    for other, record in adapters.items():
        if record.owned:
            raise UserError(
                f"the adapter {other!r} trains weights of the base model ({record.owned[0]}), which exist only once: "
                "put the second adapter on a base model of its own, or use swap_adapter"
            )


def check_has_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Raise UserError if the model lacks one of these adapters, or is inside `merged_weights`."""
    check_not_merged(model)
    adapters = state_of(model).adapters
    for name in names:
        if name not in adapters:
            raise UserError(f"the model has no adapter {name!r}; it has: {', '.join(adapters) or 'none'}")


def resolve_parts(model: nn.Module, configs: Mapping[str, PartConfig]) -> tuple[dict[str, Region], dict[str, PartPlan]]:
    """Return the region of every part and the plan for it. Raises UserError.

    Nothing is adapted yet, so mistakes are reported before, for example, a long evaluation of the base model. But an
    `nn.MultiheadAttention` that gets an adapter is made explicit, which does not change its output.
    """
    regions = find_parts(model, configs)
    plans: dict[str, PartPlan] = {}
    converted: dict[str, ExplicitAttention] = {}
    try:
        for part, config in configs.items():
            method = ADAPTERS[config.method]()
            if "targets" in method.settings:
                converted |= _convert_attentions(model, regions[part])
            plans[part] = method.plan(model, part, regions[part], config)
        _check_disjoint(plans)
        _check_token_tables(model, plans)
    except BaseException:
        plans.clear()
        raise
    finally:
        adapted = {holder_of(layer) for plan in plans.values() for layer in plan.layers}
        for path, attention in converted.items():
            if path not in adapted:
                restore_multihead(attention)
    return regions, plans


def set_adapter(model: nn.Module, name: str) -> None:
    """Make `name` the active adapter and the only trainable one. Raises UserError if the model does not have it."""
    check_has_adapters(model, [name])
    reshard(model)
    for _, layer in adapter_layers(model):
        layer.active = name if name in layer.specs else None
        for other in layer.specs:
            for parameter in layer.adapter_tensors(other).values():
                parameter.requires_grad_(other == name)
    share_inputs(model)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Compute without low-rank adapters inside the block. Weights trained in full keep their trained values."""
    check_not_merged(model)
    before = [(layer, layer.active, layer.row_adapters) for _, layer in adapter_layers(model)]
    try:
        for layer, _, _ in before:
            layer.active = layer.row_adapters = None
        yield
    finally:
        for layer, active, row_adapters in before:
            layer.active, layer.row_adapters = active, row_adapters


@contextmanager
def adapters_by_row(
    model: nn.Module, rows: Sequence[str | None], media: Sequence[str | None] | None = None
) -> Iterator[None]:
    """Use a different adapter for each row of a batch inside the block.

    Args:
        rows: The adapter name of each row of the batch; None for the base model.
        media: The adapter name of each image or frame that the vision encoder and the projector receive, in the order
            of their placeholders in the rows. Needed if one of these parts is adapted.

    Raises:
        UserError: If the model does not have one of the adapters, or if `media` is needed and missing.
        ValueError: In the forward pass, if the batch has another number of rows.
    """
    check_has_adapters(model, [name for name in (*rows, *(media or ())) if name is not None])
    parts = architecture_of(model).resolve(model)
    media_regions = [parts[part] for part in ("vision", "projector") if part in parts]
    before: list[tuple[AdapterLayer, Sequence[str | None] | None]] = []
    try:
        for path, layer in adapter_layers(model):
            reads_media = any(region.holds(path) for region in media_regions)
            if reads_media and media is None:
                raise UserError(f"{path} is adapted: name the adapter of every image too (media=[...])")
            before.append((layer, layer.row_adapters))
            layer.row_adapters = media if reads_media else rows
        yield
    finally:
        for layer, outer in before:
            layer.row_adapters = outer


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


def _convert_attentions(model: nn.Module, region: Region) -> dict[str, ExplicitAttention]:
    """Make `nn.MultiheadAttention` inside the part explicit, so that q, k, v and out are linear layers.

    Returns the new attentions by path. An attention that cannot be made explicit stays as it is. Raises UserError if
    the part is an attention itself.
    """
    attentions = {p: m for p, m in model.named_modules() if isinstance(m, nn.MultiheadAttention) and region.holds(p)}
    if root := next((path for path in attentions if path in region.roots), None):
        raise UserError(f"{root!r} is an nn.MultiheadAttention; name the module that contains it")
    converted: dict[str, ExplicitAttention] = {}
    for path, module in attentions.items():
        try:
            explicit = ExplicitAttention.from_multihead(module)
        except ValueError:
            continue  # a target inside of it is then reported as a layer that cannot have an adapter
        convert_attention(module, explicit)
        converted[path] = cast(ExplicitAttention, module)
    return converted


def _untie_adapted(model: nn.Module, whole: list[str], layers: list[str]) -> None:
    """Untie the weights of layers that get an adapter from weights that are trained in full.

    An adapter needs a frozen weight, and PEFT reads the two as separate weights.
    """
    names = [f"{layer}.weight" for layer in layers]
    tied = tied_weights(model)
    untie(model, [n for n in names if any(is_inside(other, path) for other in tied.get(n, ()) for path in whole)])


def _check_token_tables(model: nn.Module, plans: dict[str, PartPlan]) -> None:
    tables = [path for path, _ in token_rows(model)]
    for part, plan in plans.items():
        if both := sorted(set(tables) & set(plan.layers)):
            raise UserError(
                f"parts.{part}: {both[0]} holds rows of new tokens, which a low-rank adapter on the whole table would "
                "change too; exclude it, or train it in full"
            )


def _check_disjoint(plans: dict[str, PartPlan]) -> None:
    owner: dict[str, str] = {}
    for part, plan in plans.items():
        for path in plan.layers:
            if path in owner:
                raise UserError(
                    f"parts.{owner[path]} and parts.{part} both adapt {path}; narrow the targets of one of them"
                )
            owner[path] = part
    for part, plan in plans.items():
        for outer in plan.whole:
            for other, others in plans.items():
                for path in [*others.whole, *others.layers] if other != part else []:
                    if is_inside(path, outer):
                        raise UserError(
                            f"parts.{part} trains {path} in full, and parts.{other} adapts it; remove one of the two"
                        )


def _report(
    model: nn.Module, configs: dict[str, PartConfig], regions: dict[str, Region], plans: dict[str, PartPlan]
) -> InjectionReport:
    reports = []
    for part, config in configs.items():
        region, plan = regions[part], plans[part]
        adapted = [*plan.whole, *plan.layers]
        candidates = [join(region.path, p) for p, m in layers_inside(model, region).items() if is_weight(m)]
        skipped = [p for p in candidates if not any(is_inside(p, path) for path in adapted)]
        parameters = [p for n, p in region.named_parameters(model) if not n.endswith(VALUES)]
        trainable = sum(numel(p) for p in parameters if p.requires_grad)
        total = sum(numel(p) for p in parameters)
        reports.append(PartReport(part, region.path, config.method, adapted, skipped, trainable, total))
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
