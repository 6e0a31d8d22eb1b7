"""Adapter directories in PEFT's layout, both ways: save, load, swap.

Where PEFT would misread a directory, the tensors are written so that it computes the same: `use_dora` is one flag for
the whole directory, so beside DoRA a LoRA layer is written as DoRA with m = ‖W + sBA‖.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdora.adapters import AdapterLayer, LowRankSpec, adapter_layers, tensor_shapes, wrap
from mmdora.adapters.injection import AdapterRecord, check_new_name, records, set_adapter
from mmdora.adapters.layers.base import Projection
from mmdora.adapters.peft_format import (
    MAGNITUDE,
    PREFIX,
    VALUES,
    Adapter,
    metadata,
    own_config,
    peft_config,
    read_adapter,
)
from mmdora.adapters.token_rows import check_rows, load_rows, rows_contents, rows_of
from mmdora.core.atomic import written_aside
from mmdora.core.deepspeed import full_parameter, gathered, true_shape
from mmdora.core.distributed import is_main
from mmdora.core.errors import UserError
from mmdora.models.attention import explicit_where_named
from mmdora.models.new_tokens import new_tokens, train_rows


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Write one adapter as a directory that PEFT reads too. Under ZeRO every rank calls it; rank 0 writes.

    The directory appears complete or not at all. Raises UserError where the model has no such adapter.
    """
    if name not in records(model):
        raise UserError(f"the model has no adapter {name!r}; it has: {', '.join(records(model)) or 'none'}")
    tensors, config, about = adapter_contents(model, name)
    if is_main():
        write_adapter(Path(folder), tensors, config, about)


def save_best(model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
    """Write the adapter as `folder`/adapter beside `best.json`, both at once. Under ZeRO every rank calls it."""
    contents = adapter_contents(model, "default")
    if is_main():
        with written_aside(folder) as aside:
            write_adapter(aside / "adapter", *contents)
            (aside / "best.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], about: dict[str, str]) -> None:
    """Write an adapter directory, complete or not at all."""
    with written_aside(folder) as aside:
        save_file(tensors, aside / "adapter_model.safetensors", metadata=about)
        (aside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_contents(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """The tensors, config and metadata of one adapter, gathered and on the CPU."""
    layers, record = dict(adapter_layers(model, name)), records(model)[name]
    specs = {path: layer.specs[name] for path, layer in layers.items()}
    in_peft = all(layer.in_peft and not layer.specs[name].use_vera for layer in layers.values())
    dora = in_peft and any(spec.use_dora for spec in specs.values())
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}  # by the identity of a shared projection: the layer whose name it is saved under
    for path, layer in layers.items():
        found: dict[str, Tensor] = {}
        for suffix, parameter in layer.adapter_tensors(name).items():
            found[suffix] = _cpu(full_parameter(parameter))
        if dora:
            found = _as_dora(layer, name, found)
        if specs[path].use_vera:
            shared = layer.vera[name]
            if owners.setdefault(id(shared), path) == path:
                found |= {"vera_A": _cpu(shared.vera_A), "vera_B": _cpu(shared.vera_B)}
        tensors |= {f"{PREFIX}{path}.{suffix}": tensor for suffix, tensor in found.items()}
    for path in record.whole:
        for key, tensor in _state(model.get_submodule(path), path).items():
            tensors[f"{PREFIX}{key}"] = _cpu(full_parameter(tensor).to(tensor.dtype))
    rows = rows_contents(model)
    tensors |= {f"{PREFIX}{path}.{VALUES}": values for path, (_, values) in rows.items()}
    base = getattr(model, "name_or_path", None) or None
    ids = {path: ids for path, (ids, _) in rows.items()}
    config = (peft_config if in_peft else own_config)(base, specs, record.whole, ids)
    projections = {path: owners[id(layer.vera[name])] for path, layer in layers.items() if specs[path].use_vera}
    return tensors, config, metadata(specs, record.parts, projections, new_tokens(model))


def _as_dora(layer: AdapterLayer, name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """One layer's tensors as DoRA's, for a directory where PEFT reads every layer so: LoRA with the magnitude at which
    DoRA computes the same, and a magnitude alone beside a product of rank 1 that is zero and stays so."""
    spec = layer.specs[name]
    shapes = layer.shapes(layer, max(spec.rank, 1))
    if not spec.use_dora:
        return found | {MAGNITUDE: _cpu(layer.fresh_norm(name)).view(shapes.magnitude)}
    if not spec.rank:
        a, b = (f"{attribute}{layer.file_suffix}" for attribute in layer.low_rank)
        return found | {a: torch.zeros(shapes.a), b: torch.zeros(shapes.b)}
    return found


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Put the adapter of a directory (ours or PEFT's) on `model`, trainable and active.

    Everything is checked before anything changes. Raises UserError that names the file and the tensor at fault.
    """
    check_new_name(model, name)
    adapter = read_adapter(Path(folder))
    hidden = explicit_where_named(model, adapter.specs)
    try:
        whole = _check_fits(model, adapter)
    except UserError:
        for parent, leaf, attention in hidden:
            setattr(parent, leaf, attention)
        raise
    model.requires_grad_(False)
    projections: dict[str, Projection] = {}
    for path, spec in adapter.specs.items():
        _add(wrap(model, path), name, spec, adapter, path, projections)
    _copy_whole(model, adapter)
    load_rows(model, adapter)
    records(model)[name] = AdapterRecord(adapter.parts, whole, train_rows(model))
    set_adapter(model, name)


def swap_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Put the tensors of a directory in the place of an adapter that the model has, on the same layers.

    Where shapes agree, the parameters themselves stay, so that compiled code and optimizers go on with them; ranks and
    scales may differ. Everything is checked before anything changes. Raises UserError.
    """
    adapter = read_adapter(Path(folder))
    whole = _check_same_layers(model, adapter, name)
    projections: dict[str, Projection] = {}
    for path, layer in adapter_layers(model, name):
        spec, active, trained = adapter.specs[path], layer.active, _is_trained(layer, name)
        shapes = layer.named_shapes(layer.shapes(layer, spec.rank), spec)
        if {
            suffix: tuple(p.shape) for suffix, p in layer.adapter_tensors(name).items()
        } == shapes and not spec.use_vera:
            layer.specs[name] = spec
            _copy_layer(layer, name, adapter.layers[path])
        else:
            layer.remove_adapter(name)
            _add(layer, name, spec, adapter, path, projections)
            layer.active = active
            for parameter in layer.adapter_tensors(name).values():
                parameter.requires_grad_(trained)
    _copy_whole(model, adapter)
    load_rows(model, adapter)
    records(model)[name] = AdapterRecord(adapter.parts, whole, records(model)[name].rows)


def load_weights(model: nn.Module, folder: Path, name: str = "default") -> None:
    """Copy a directory's tensors into an adapter of the same shapes. Raises UserError where they do not fit."""
    adapter = read_adapter(folder)
    _check_same_layers(model, adapter, name)
    layers = dict(adapter_layers(model, name))
    for path, layer in layers.items():
        if layer.specs[name] != adapter.specs[path]:
            raise UserError(f"{folder}: made with other `parts` than this run's: {path} has {adapter.specs[path]}")
    for path, layer in layers.items():
        _copy_layer(layer, name, adapter.layers[path])
    _copy_whole(model, adapter)
    load_rows(model, adapter)


def _check_same_layers(model: nn.Module, adapter: Adapter, name: str) -> list[str]:
    """As `_check_fits`, for an adapter that takes the place of another."""
    if name not in records(model):
        raise UserError(f"the model has no adapter {name!r}; it has: {', '.join(records(model)) or 'none'}")
    whole = _check_fits(model, adapter)
    here = dict.fromkeys(path for path, _ in adapter_layers(model, name))
    record = records(model)[name]
    tuned = ((list(here), list(adapter.specs)), (record.whole, whole), (record.rows, rows_of(model, adapter)))
    for mine, theirs in tuned:
        if odd := sorted(set(mine) ^ set(theirs)):
            raise UserError(f"{adapter.folder}: made with other `parts`: {odd[0]} is tuned in only one of the two")
    return whole


def _is_trained(layer: AdapterLayer, name: str) -> bool:
    return any(parameter.requires_grad for parameter in layer.adapter_tensors(name).values())


def _add(
    layer: AdapterLayer, name: str, spec: LowRankSpec, adapter: Adapter, path: str, projections: dict[str, Projection]
) -> None:
    shared = None
    if spec.use_vera:
        owner, device = adapter.shared[path], layer.weight.device
        if owner not in projections:
            pair = adapter.layers[owner]
            projections[owner] = Projection(pair["vera_A"].float().to(device), pair["vera_B"].float().to(device))
        shared = projections[owner]
    layer.add_adapter(name, spec, shared=shared)
    _copy_layer(layer, name, adapter.layers[path])


def _copy_layer(layer: AdapterLayer, name: str, found: dict[str, Tensor]) -> None:
    for suffix, parameter in layer.adapter_tensors(name).items():
        _copy(parameter, found[suffix])


def _copy_whole(model: nn.Module, adapter: Adapter) -> None:
    here = _state(model)
    for key, tensor in adapter.whole.items():
        _copy(here[key], tensor)
        if isinstance(here[key], nn.Parameter):
            here[key].requires_grad_(True)


def _state(module: nn.Module, path: str = "") -> dict[str, Tensor]:
    """What a state dict holds, as the module's own tensors: parameters, tied ones under each name, and buffers."""
    kept = module.state_dict(prefix=f"{path}." if path else "").keys()
    found: dict[str, Tensor] = dict(module.named_parameters(path, remove_duplicate=False))
    found |= dict(module.named_buffers(path, remove_duplicate=False))
    return {key: tensor for key, tensor in found.items() if key in kept}


def _check_fits(model: nn.Module, adapter: Adapter) -> list[str]:
    """Raise UserError unless every tensor has its place in the model; returns the modules that it holds in full."""
    for path, spec in adapter.specs.items():
        shapes, found = tensor_shapes(model, path, spec), adapter.layers[path]
        if shapes is None:
            module = dict(model.named_modules()).get(path)
            there = "is not in this model" if module is None else f"is a {type(module).__name__}, which can have none"
            raise UserError(f"{adapter.folder}: made for another model: {path} {there}")
        for suffix, shape in shapes.items():
            where = f"{adapter.folder}: tensor {PREFIX}{path}.{suffix}"
            if suffix not in found:
                raise UserError(f"{where} is missing")
            if tuple(found[suffix].shape) != shape:
                raise UserError(f"{where} has shape {list(found[suffix].shape)}; this model needs {list(shape)}")
        if spec.use_vera:
            _check_projection(model, adapter, path, spec.rank)
    check_rows(model, adapter)
    here = _state(model)
    for path, tensor in adapter.base.items():
        mine = here.get(f"{path}.weight")
        if mine is None or mine.shape != tensor.shape or not torch.allclose(mine.cpu().float(), tensor.float()):
            raise UserError(
                f"{adapter.folder}: tensor {PREFIX}{path}.base_layer.weight is of another base than this model's"
            )
    for key, tensor in adapter.whole.items():
        needed = true_shape(here[key]) if key in here else None
        if needed != tuple(tensor.shape):
            wanted = "has no such parameter" if needed is None else f"needs {list(needed)}"
            raise UserError(
                f"{adapter.folder}: tensor {PREFIX}{key} has shape {list(tensor.shape)}; this model {wanted}"
            )
    modules = [path for path, _ in model.named_modules()]
    whole: list[str] = []
    for end in adapter.whole_paths:
        found_here = [path for path in modules if path == end or path.endswith(f".{end}")]
        exact = [path for path in found_here if path == end or any(key.startswith(f"{path}.") for key in adapter.whole)]
        if not exact:
            raise UserError(f"{adapter.folder}: 'modules_to_save' names {end!r}, which is not in this model")
        whole += [end] if end in exact else exact
    return whole


def _check_projection(model: nn.Module, adapter: Adapter, path: str, rank: int) -> None:
    owner = adapter.shared.get(path, "")
    found = adapter.layers.get(owner, {})
    shapes = tensor_shapes(model, path, LowRankSpec(rank, alpha=rank)) or {}
    if set(shapes) != {"lora_A.weight", "lora_B.weight"} or len(shapes["lora_A.weight"]) != 2:
        raise UserError(f"{adapter.folder}: {path} is no linear layer, and dvora is for those alone")
    for suffix, least in (("vera_A", shapes["lora_A.weight"]), ("vera_B", shapes["lora_B.weight"])):
        shape = tuple(found[suffix].shape) if suffix in found else ()
        if len(shape) != 2 or shape[0] < least[0] or shape[1] < least[1]:
            raise UserError(
                f"{adapter.folder}: tensor {PREFIX}{owner}.{suffix} has shape {list(shape)}; {path} needs "
                f"at least {list(least)}"
            )


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def _copy(parameter: Tensor, tensor: Tensor) -> None:
    with gathered([parameter], write=True):
        parameter.copy_(tensor)
