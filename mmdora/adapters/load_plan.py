"""Plan how the tensors of an adapter directory go into a model, and apply the plan.

`plan_load` checks everything and changes nothing, so a directory that does not fit leaves the model as it was.
`apply_plan` does not fail on anything that the plan has checked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mmdora.adapters import AdapterLayer, LowRankSpec, adapter_layers, tensor_shapes, wrap
from mmdora.adapters.layers.base import SharedVeRA
from mmdora.adapters.layers.wrapping import plain_path
from mmdora.adapters.peft_format import PREFIX, Adapter
from mmdora.adapters.token_rows import check_token_rows, load_token_rows, row_owners
from mmdora.core.deepspeed import gathered, true_shape
from mmdora.core.errors import UserError
from mmdora.core.sharding import copy_whole, whole_tensor
from mmdora.models.architectures import is_inside
from mmdora.models.attention import ExplicitAttention, convert_attention
from mmdora.models.model_state import frozen_adapter_of
from mmdora.models.new_tokens import fold_token_rows, token_rows
from mmdora.models.tied_weights import holder_of, tied_weights, untie, with_tied_modules

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")  # the linear layers of an explicit attention


@dataclass(frozen=True)
class LoadPlan:
    """The modules of one model that receive the tensors of an adapter directory."""

    adapter: Adapter
    attentions: dict[str, ExplicitAttention]  # by path: replacements of `nn.MultiheadAttention`
    specs: dict[str, LowRankSpec]  # by layer path: low-rank adapters
    modules_in_full: list[str]  # full paths of the modules trained in full
    trained: list[str]  # names of the full tensors that are trained
    untied: list[str]  # names of tied parameters that get a tensor of their own
    row_owners: dict[str, str]  # by path of each table with token rows: the table whose rows it uses
    vera_owners: dict[str, str]  # by layer path: the layer whose `vera_A` and `vera_B` it shares

    @property
    def token_tables(self) -> list[str]:
        """Paths of the tables with token rows; for tables that share them only the first."""
        return [path for path, owner in self.row_owners.items() if path == owner]


def plan_load(model: nn.Module, adapter: Adapter) -> LoadPlan:
    """Return how to load an adapter directory into `model`, which does not change.

    Raises UserError that names the directory and the tensor if a tensor is missing or does not fit.
    """
    _check_frozen_adapter(model, adapter)
    attentions = _attentions_to_replace(model, adapter)
    for path, spec in adapter.specs.items():
        # A layer inside a replaced attention is looked up in the replacement.
        parent, _, leaf = path.rpartition(".")
        root, inside = (attentions[parent], leaf) if parent in attentions else (model, path)
        _check_layer(model, adapter, path, tensor_shapes(root, inside, spec))
        if spec.use_vera:
            _check_vera(adapter, path, tensor_shapes(root, inside, LowRankSpec(spec.rank, alpha=spec.rank)) or {})
    check_token_rows(model, adapter)
    tensors = named_state(model)
    for path, attention in attentions.items():
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{path}.")}
        tensors |= named_state(attention, path)
    _check_base(adapter, tensors)
    _check_full_tensors(adapter, tensors)
    modules_to_save = _modules_to_save(model, adapter, attentions)
    trained = [name for name in adapter.full_tensors if any(is_inside(name, path) for path in modules_to_save)]
    others = {name: tensor for name, tensor in adapter.full_tensors.items() if name not in trained}
    if others and all(_is_close(tensors[name], tensor).all() for name, tensor in others.items()):
        # PEFT has saved the embeddings of the base model too.
        adapter = replace(adapter, full_tensors={name: adapter.full_tensors[name] for name in trained})
    untied = _weights_to_untie(model, adapter, trained)
    modules_in_full = list(dict.fromkeys([*modules_to_save, *_other_modules(adapter, trained)]))
    return LoadPlan(
        adapter=adapter,
        attentions=attentions,
        specs=adapter.specs,
        modules_in_full=with_tied_modules(model, modules_in_full, untied),
        trained=trained,
        untied=untied,
        row_owners=row_owners(model, adapter, untied),
        vera_owners={path: adapter.vera_owners[path] for path, spec in adapter.specs.items() if spec.use_vera},
    )


def apply_plan(model: nn.Module, plan: LoadPlan, name: str) -> None:
    """Load the planned tensors into the adapter `name`, whose layers are created if needed.

    An existing adapter keeps its parameters if their shapes agree, so that optimizers and compiled code remain valid.
    Otherwise it gets new ones, with the same `requires_grad`.
    """
    for path, attention in plan.attentions.items():
        convert_attention(cast(nn.MultiheadAttention, model.get_submodule(path)), attention)
    untie(model, plan.untied)
    # Tables that are loaded as a whole need no rows of their own.
    fold_token_rows(model, [path for path, _ in token_rows(model) if f"{path}.weight" in plan.adapter.full_tensors])
    pairs: dict[str, SharedVeRA] = {}
    for path, spec in plan.specs.items():
        layer, tensors = wrap(model, path), plan.adapter.layers[path]
        pair = plan.adapter.layers[plan.vera_owners[path]] if spec.use_vera else None
        if _has_same_parameters(layer, name, spec, pair):
            layer.specs[name] = spec
        else:
            owner = plan.vera_owners.get(path)
            if owner is not None and owner not in pairs:
                pairs[owner] = _shared_vera(plan.adapter.layers[owner], layer.weight.device)
            _replace_adapter(layer, name, spec, None if owner is None else pairs[owner])
        for suffix, parameter in layer.adapter_tensors(name).items():
            _copy(parameter, tensors[suffix])
    named = named_state(model)
    for key, tensor in plan.adapter.full_tensors.items():
        _copy(named[key], tensor)
    load_token_rows(model, plan.adapter.token_rows, plan.row_owners)


def new_parameters(model: nn.Module, plan: LoadPlan, name: str) -> str | None:
    """Return the first layer whose adapter `name`, which it has, would get new parameters; None if there is none."""
    for path, layer in adapter_layers(model, name):
        spec = plan.specs[path]
        pair = plan.adapter.layers[plan.vera_owners[path]] if spec.use_vera else None
        if not _has_same_parameters(layer, name, spec, pair):
            return path
    return None


def named_state(module: nn.Module, path: str = "") -> dict[str, Tensor]:
    """Return the tensors of a module's state dict themselves, not detached: tied ones under each name, and buffers."""
    kept = {plain_path(key) for key in module.state_dict(prefix=f"{path}." if path else "")}
    tensors: dict[str, Tensor] = dict(module.named_parameters(path, remove_duplicate=False))
    tensors |= dict(module.named_buffers(path, remove_duplicate=False))
    plain = {plain_path(key): tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in plain.items() if key in kept}


def _attentions_to_replace(model: nn.Module, adapter: Adapter) -> dict[str, ExplicitAttention]:
    """Return an explicit attention for every `nn.MultiheadAttention` whose projections the directory adapts."""
    parents = {path.rpartition(".")[0] for path in adapter.specs if path.endswith(PROJECTIONS)}
    attentions: dict[str, ExplicitAttention] = {}
    for path, module in model.named_modules():
        if path and path in parents and isinstance(module, nn.MultiheadAttention):
            try:
                attentions[path] = ExplicitAttention.from_multihead(module)
            except ValueError as error:
                raise UserError(f"{adapter.folder}: {path} cannot be adapted: {error}") from error
    return attentions


def _check_frozen_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Raise UserError if the adapter was trained on top of a frozen one that the model's weights do not include."""
    needs, has = adapter.frozen_adapter, frozen_adapter_of(model)
    if needs is not None and (has is None or Path(needs).resolve() != Path(has).resolve()):
        raise UserError(
            f"{adapter.folder}: trained on top of {needs}, and this model includes {has or 'no other adapter'}; set "
            f"model.frozen_adapter to {needs}"
        )


def _check_layer(model: nn.Module, adapter: Adapter, path: str, shapes: dict[str, tuple[int, ...]] | None) -> None:
    if shapes is None:
        module = dict(model.named_modules()).get(path)
        reason = "is not in this model" if module is None else f"is a {type(module).__name__}, which cannot be adapted"
        raise UserError(f"{adapter.folder}: made for another model: {path} {reason}")
    tensors = adapter.layers[path]
    for suffix, shape in shapes.items():
        where = f"{adapter.folder}: tensor {PREFIX}{path}.{suffix}"
        if suffix not in tensors:
            raise UserError(f"{where} is missing")
        if tuple(tensors[suffix].shape) != shape:
            raise UserError(f"{where} has shape {list(tensors[suffix].shape)}; this model needs {list(shape)}")


def _check_vera(adapter: Adapter, path: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check the shared matrices of one layer, for which LoRA's A and B would have these shapes."""
    owner = adapter.vera_owners.get(path, "")
    tensors = adapter.layers.get(owner, {})
    if set(shapes) != {"lora_A.weight", "lora_B.weight"} or len(shapes["lora_A.weight"]) != 2:
        raise UserError(f"{adapter.folder}: {path} is not a linear layer, and dvora supports only these")
    for suffix, least in (("vera_A", shapes["lora_A.weight"]), ("vera_B", shapes["lora_B.weight"])):
        shape = tuple(tensors[suffix].shape) if suffix in tensors else ()
        if len(shape) != 2 or shape[0] < least[0] or shape[1] < least[1]:
            raise UserError(
                f"{adapter.folder}: tensor {PREFIX}{owner}.{suffix} has shape {list(shape)}; {path} needs "
                f"at least {list(least)}"
            )


def _check_base(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """Check that base weights which the directory contains are those of the model."""
    for path, expected in adapter.base_weights.items():
        weight = tensors.get(f"{path}.weight")
        weight = None if weight is None else whole_tensor(weight)
        same = weight is not None and weight.shape == expected.shape
        if weight is not None and same:
            differs = ~_is_close(weight, expected)
            differs[list(adapter.token_rows.get(path, ()))] = False  # these rows are not used
            same = not differs.any()
        if not same:
            raise UserError(
                f"{adapter.folder}: tensor {PREFIX}{path}.base_layer.weight belongs to another base model than this one"
            )


def _is_close(weight: Tensor, expected: Tensor) -> Tensor:
    return torch.isclose(weight.cpu().float(), expected.float())


def _check_full_tensors(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    for key, tensor in adapter.full_tensors.items():
        shape = true_shape(tensors[key]) if key in tensors else None
        if shape != tuple(tensor.shape):
            needs = "has no such parameter" if shape is None else f"needs {list(shape)}"
            raise UserError(
                f"{adapter.folder}: tensor {PREFIX}{key} has shape {list(tensor.shape)}; this model {needs}"
            )


def _weights_to_untie(model: nn.Module, adapter: Adapter, trained: list[str]) -> list[str]:
    """Return the names of tied parameters that need a tensor of their own.

    PEFT trains a copy of each module in `modules_to_save`, so the other modules that hold the weight keep that of the
    base model. The weight stays tied if the directory has the same tensor under all of its names.
    """
    tied = tied_weights(model)
    given: dict[str, str] = {}  # names in the directory, by the first name of the same parameter of the same module
    for key in adapter.full_tensors:
        holder = model.get_submodule(holder_of(key)) if key in tied else None
        given |= {name: key for name in tied.get(key, ()) if model.get_submodule(holder_of(name)) is holder}
    untied: list[str] = []
    for names in {tuple(group) for group in tied.values()}:
        tensors = {name: adapter.full_tensors[given[name]] for name in names if name in given}
        copies = [name for name in tensors if given[name] in trained]
        in_base = [name for name in tensors if name not in copies]
        first = next(iter(tensors.values()), None)
        same = all(torch.equal(tensor, first) for tensor in tensors.values() if first is not None)
        if same and (adapter.version == 1 or not copies or len(tensors) == len(names)):
            continue
        keeps_shared = 0 if in_base or len(tensors) < len(names) else 1
        untied += copies[keeps_shared:]
        untied += [name for name in in_base[1:] if not torch.equal(tensors[name], tensors[in_base[0]])]
    return untied


def _other_modules(adapter: Adapter, trained: list[str]) -> list[str]:
    """Return the modules of full tensors that are not trained, but are not those of the base model either.

    PEFT saves embeddings that were resized.
    """
    others = [name for name in adapter.full_tensors if name not in trained]
    if top := next((name for name in others if not holder_of(name)), None):
        raise UserError(f"{adapter.folder}: tensor {PREFIX}{top} belongs to no module that 'modules_to_save' names")
    return [holder_of(name) for name in others]


def _modules_to_save(model: nn.Module, adapter: Adapter, attentions: dict[str, ExplicitAttention]) -> list[str]:
    """Return the full paths of the modules that `modules_to_save` names by the ends of their paths."""
    paths = [path for path, _ in model.named_modules()]
    paths += [f"{path}.{name}" for path, attention in attentions.items() for name, _ in attention.named_children()]
    modules: list[str] = []
    for end in adapter.modules_to_save:
        matching = [path for path in paths if path == end or path.endswith(f".{end}")]
        with_tensors = [
            path for path in matching if path == end or any(key.startswith(f"{path}.") for key in adapter.full_tensors)
        ]
        if not with_tensors:
            raise UserError(f"{adapter.folder}: 'modules_to_save' names {end!r}, which is not in this model")
        modules += [end] if end in with_tensors else with_tensors
    return modules


def _shared_vera(tensors: dict[str, Tensor], device: torch.device) -> SharedVeRA:
    return SharedVeRA(tensors["vera_A"].float().to(device), tensors["vera_B"].float().to(device))


def _has_same_parameters(layer: AdapterLayer, name: str, spec: LowRankSpec, pair: dict[str, Tensor] | None) -> bool:
    """Return whether the layer has this adapter with the shapes of `spec`, and for VeRA with the same A and B."""
    if name not in layer.specs:
        return False
    current = {suffix: tuple(parameter.shape) for suffix, parameter in layer.adapter_tensors(name).items()}
    if current != layer.named_shapes(layer.shapes(layer, spec.rank), spec):
        return False
    if pair is None:
        return True
    shared = layer.vera[name]
    return all(torch.equal(getattr(shared, key).cpu(), pair[key].float()) for key in ("vera_A", "vera_B"))


def _replace_adapter(layer: AdapterLayer, name: str, spec: LowRankSpec, shared: SharedVeRA | None) -> None:
    """Give the layer new parameters for the adapter `name`."""
    active, trainable = layer.active, True
    if name in layer.specs:
        trainable = any(parameter.requires_grad for parameter in layer.adapter_tensors(name).values())
        layer.remove_adapter(name)
    layer.add_adapter(name, spec, shared=shared)
    layer.active = active
    for parameter in layer.adapter_tensors(name).values():
        parameter.requires_grad_(trainable)


@torch.no_grad()
def _copy(parameter: Tensor, tensor: Tensor) -> None:
    with gathered([parameter], write=True):
        copy_whole(parameter, tensor)
