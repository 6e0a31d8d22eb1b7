"""Save, load and swap adapters as directories in PEFT's layout.

PEFT has one flag `use_dora` for a whole directory. If an adapter has DoRA and LoRA layers, the LoRA layers are written
as DoRA with m = ‖W + sBA‖, with which PEFT computes the same. Loading them here gives LoRA layers again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdora.adapters import AdapterLayer, LowRankSpec, adapter_layers
from mmdora.adapters.injection import check_has_adapters, check_new_name, set_adapter
from mmdora.adapters.layers.wrapping import plain_path
from mmdora.adapters.load_plan import LoadPlan, apply_plan, named_state, new_parameters, plan_load
from mmdora.adapters.peft_format import (
    MAGNITUDE,
    PREFIX,
    VALUES,
    metadata,
    own_config,
    peft_config,
    read_adapter,
)
from mmdora.adapters.token_rows import token_row_contents
from mmdora.core.atomic import written_aside
from mmdora.core.deepspeed import full_parameter
from mmdora.core.distributed import is_main
from mmdora.core.errors import UserError
from mmdora.core.sharding import check_not_split, is_split, reshard, whole_tensor
from mmdora.models.architectures import is_inside
from mmdora.models.attention import ExplicitAttention
from mmdora.models.model_state import AdapterRecord, frozen_adapter_of, state_of
from mmdora.models.new_tokens import new_tokens, train_token_rows
from mmdora.models.tied_weights import holder_of

log = logging.getLogger(__name__)


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Write one adapter as a directory that PEFT can read too.

    The directory appears complete or not at all. Under ZeRO and `fully_shard` every process has to call this, outside
    the forward pass; rank 0 writes. Raises UserError if the model has no such adapter.
    """
    reshard(model)
    tensors, config, about = adapter_contents(model, name, keep=is_main())
    if is_main():
        write_adapter(Path(folder), tensors, config, about)


def save_best(model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
    """Write the adapter as `folder`/adapter and `about` as `folder`/best.json, both at once.

    Under ZeRO every rank has to call this; rank 0 writes.
    """
    contents = adapter_contents(model, "default")
    if is_main():
        with written_aside(folder) as aside:
            write_adapter(aside / "adapter", *contents)
            (aside / "best.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], about: dict[str, str]) -> None:
    """Write an adapter directory, which appears complete or not at all."""
    with written_aside(folder) as aside:
        save_file(tensors, aside / "adapter_model.safetensors", metadata=about)
        (aside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_contents(
    model: nn.Module, name: str, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Return the tensors, config and metadata of one adapter, gathered and on the CPU.

    With `keep=False` this process takes part in the gathering, and returns no tensors.

    Raises UserError for an adapter on a weight that is trained in full, as version 0.1.0 allowed for tied weights.
    """
    check_has_adapters(model, [name])
    layers, record = dict(adapter_layers(model, name)), state_of(model).adapters[name]
    modules_in_full = [plain_path(path) for path in record.modules_in_full]
    if both := [path for path in layers if any(is_inside(path, module) for module in modules_in_full)]:
        raise UserError(
            f"{both[0]} has a low-rank adapter, and its weight is tied to one that was trained in full. An adapter "
            "directory cannot hold this any more: merge the adapter instead"
        )
    specs = {path: layer.specs[name] for path, layer in layers.items()}
    frozen = frozen_adapter_of(model)  # PEFT would compute without it
    in_peft = frozen is None and all(
        is_in_peft(model, *item) and not item[1].specs[name].use_vera for item in layers.items()
    )
    dora = in_peft and any(spec.use_dora for spec in specs.values())
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}  # by id of a SharedVeRA: the layer under whose name it is saved
    for path, layer in layers.items():
        own: dict[str, Tensor] = {}
        for suffix, parameter in layer.adapter_tensors(name).items():
            own[suffix] = _cpu(_whole(parameter))
        if dora:
            own = _as_dora(layer, name, own)
        if specs[path].use_vera:
            shared = layer.vera[name]
            if owners.setdefault(id(shared), path) == path:
                own |= {"vera_A": _cpu(shared.vera_A), "vera_B": _cpu(shared.vera_B)}
        tensors |= {f"{PREFIX}{path}.{suffix}": tensor for suffix, tensor in own.items() if keep}
    for path in modules_in_full:
        for key, tensor in named_state(model.get_submodule(path), path).items():
            gathered = _whole(tensor)
            if keep:
                tensors[f"{PREFIX}{key}"] = _cpu(gathered.to(tensor.dtype))
    rows = token_row_contents(model)
    tensors |= {f"{PREFIX}{path}.{VALUES}": values for path, (_, values) in rows.items()}
    base = getattr(model, "name_or_path", None) or None
    ids = {path: ids for path, (ids, _) in rows.items()}
    config = (peft_config if in_peft else own_config)(base, specs, modules_in_full, ids)
    if frozen is not None:
        config["frozen_adapter"] = frozen
    vera_owners = {path: owners[id(layer.vera[name])] for path, layer in layers.items() if specs[path].use_vera}
    return tensors, config, metadata(specs, record.parts, vera_owners, new_tokens(model))


def is_in_peft(model: nn.Module, path: str, layer: AdapterLayer) -> bool:
    """Return whether PEFT computes the same with this layer's tensors. It has no layers for the projections of an
    `nn.MultiheadAttention`, and would skip them without a word."""
    attention = model.get_submodule(holder_of(path))
    return layer.in_peft and not (isinstance(attention, ExplicitAttention) and attention.converted)


def _as_dora(layer: AdapterLayer, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one layer's tensors with all that PEFT needs to read the layer as DoRA.

    LoRA gets the magnitude with which DoRA computes the same. A magnitude alone gets a low-rank product of rank 1 that
    is zero; since A and B are both zero, training in PEFT does not change it.
    """
    spec = layer.specs[name]
    shapes = layer.shapes(layer, max(spec.rank, 1))
    if not spec.use_dora:
        return tensors | {MAGNITUDE: _cpu(layer.fresh_norm(name)).view(shapes.magnitude)}
    if not spec.rank:
        a, b = (f"{attribute}{layer.file_suffix}" for attribute in layer.low_rank)
        return tensors | {a: torch.zeros(shapes.a), b: torch.zeros(shapes.b)}
    return tensors


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Add the adapter of a directory, written here or by PEFT, to `model`. It becomes trainable and active.

    Raises UserError that names the file and the tensor if the directory does not fit; the model is then unchanged. A
    model that is sharded by `fully_shard` does not take new adapters; `swap_adapter` works for adapters that it has.
    """
    check_not_split(model, "load_adapter", "load the adapter before fully_shard, or use swap_adapter")
    check_new_name(model, name)
    plan = plan_load(model, read_adapter(Path(folder)))
    owned, others = [*plan.modules_in_full, *plan.token_tables], state_of(model).adapters
    if owned and others:
        raise UserError(
            f"{folder}: holds weights of {owned[0]}, which the adapter {next(iter(others))!r} uses too; load it into a "
            "base model of its own"
        )
    model.requires_grad_(False)
    apply_plan(model, plan, name)
    named = named_state(model)
    for parameter in (named[key] for key in plan.trained):
        if isinstance(parameter, nn.Parameter):
            parameter.requires_grad_(True)
    token_tables = train_token_rows(model)
    state_of(model).adapters[name] = AdapterRecord(plan.adapter.parts, plan.modules_in_full, token_tables)
    set_adapter(model, name)


def swap_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Replace an adapter of the model by the adapter of a directory, which must adapt the same layers.

    Ranks and scales may differ. Parameters whose shapes agree are kept and overwritten, so that optimizers and compiled
    code remain valid. Under `fully_shard` all shapes must agree, and every process calls this. Raises UserError if the
    directory does not fit; the model is then unchanged.
    """
    plan = _plan_replacement(model, Path(folder), name)
    apply_plan(model, plan, name)
    state_of(model).adapters[name] = AdapterRecord(plan.adapter.parts, plan.modules_in_full, plan.token_tables)


def load_weights(model: nn.Module, folder: Path, name: str = "default") -> None:
    """Copy a directory's tensors into an adapter with the same layers, shapes and settings, as resuming a run does.

    Raises UserError if the directory does not fit; the model is then unchanged.
    """
    plan = _plan_replacement(model, folder, name)
    for path, layer in adapter_layers(model, name):
        if layer.specs[name] != plan.specs[path]:
            raise UserError(f"{folder}: made with other `parts` than this run's: {path} has {plan.specs[path]}")
    apply_plan(model, plan, name)


def continue_adapter(model: nn.Module, folder: Path, name: str = "default") -> None:
    """Start an adapter of the model from a directory, written here or by PEFT, which must compute the same function.

    Layers, methods, ranks and scales must agree. Settings that only matter in training, such as dropout, remain those
    of the model. Raises UserError if the directory does not fit; the model is then unchanged.
    """
    plan = _plan_replacement(model, folder, name)
    if plan.adapter.frozen_adapter is None and (frozen := frozen_adapter_of(model)):
        log.warning("%s does not say that it was trained on top of %s; it continues on top of it now", folder, frozen)
    specs = {path: layer.specs[name] for path, layer in adapter_layers(model, name)}
    for path, spec in plan.specs.items():
        theirs, mine = _function(spec), _function(specs[path])
        if theirs != mine:
            raise UserError(f"{folder}: {path} has {theirs}, but this run's `parts` give it {mine}; make them equal")
    apply_plan(model, replace(plan, specs=specs), name)


def _function(spec: LowRankSpec) -> str:
    """Describe the settings of a layer that determine what its tensors compute."""
    method = "dvora" if spec.use_vera else "dora" if spec.use_dora else "lora"
    if not spec.rank:
        return "a magnitude alone"
    return f"{method} of rank {spec.rank} with alpha / rank {spec.scale:.6g}"


def _plan_replacement(model: nn.Module, folder: Path, name: str) -> LoadPlan:
    """Return the plan of a directory that adapts the same modules as the model's adapter `name`. Raises UserError."""
    reshard(model)
    check_has_adapters(model, [name])
    plan = plan_load(model, read_adapter(folder))
    if plan.untied:
        raise UserError(
            f"{folder}: holds a tensor of its own for {plan.untied[0]}, which is tied in this model; load it into a "
            "new base model"
        )
    record = state_of(model).adapters[name]
    current = ([path for path, _ in adapter_layers(model, name)], record.modules_in_full, record.token_tables)
    for mine, others in zip(current, (plan.specs, plan.modules_in_full, plan.token_tables), strict=True):
        if different := sorted(set(mine) ^ set(others)):
            raise UserError(f"{folder}: made with other `parts`: {different[0]} is adapted in only one of the two")
    if any(is_split(parameter) for parameter in model.parameters()) and (changed := new_parameters(model, plan, name)):
        raise UserError(
            f"{folder}: {changed} needs tensors of other shapes than the model's adapter {name!r}, which is sharded by "
            "fully_shard; load it before fully_shard"
        )
    return plan


def _whole(parameter: Tensor) -> Tensor:
    return whole_tensor(parameter) if is_split(parameter) else full_parameter(parameter)


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
