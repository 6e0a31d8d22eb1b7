"""Adapter directories in PEFT's layout, both ways: save, load, merge.

Where PEFT would misread a directory, the tensors are written so that it computes the same: `use_dora` is one flag for
the whole directory, so beside DoRA a LoRA layer is written as DoRA with m = ‖W + sBA‖.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdora.adapters import adapter_layers
from mmdora.adapters.lora import wrap
from mmdora.errors import UserError
from mmdora.injection import AdapterRecord, records, set_adapter
from mmdora.peft_format import PREFIX, Adapter, peft_config, read_adapter
from mmdora.zero import gathered


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Write one adapter as a directory that PEFT reads too. Under ZeRO every rank calls it; rank 0 writes.

    The directory appears complete or not at all. Raises UserError where the model has no such adapter.
    """
    if name not in records(model):
        raise UserError(f"the model has no adapter {name!r}; it has: {', '.join(records(model)) or 'none'}")
    tensors, config, metadata = adapter_contents(model, name)
    if int(os.environ.get("RANK", "0")) == 0:
        with written_aside(Path(folder)) as aside:
            save_file(tensors, aside / "adapter_model.safetensors", metadata=metadata)
            (aside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_contents(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """The tensors, PEFT config and metadata of one adapter, gathered and on the CPU."""
    layers = dict(adapter_layers(model, name))
    dora = any(layer.specs[name].use_dora for layer in layers.values())
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        for suffix, parameter in layer.adapter_tensors(name).items():
            with gathered([parameter]):
                tensors[f"{PREFIX}{path}.{suffix}"] = _cpu(parameter)
        if dora and not layer.specs[name].use_dora:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = _cpu(layer.magnitude_for(name))
    record = records(model)[name]
    for path in record.whole:
        for key, parameter in model.get_submodule(path).named_parameters(prefix=path):
            with gathered([parameter]):
                tensors[f"{PREFIX}{key}"] = _cpu(parameter)
    specs = {path: layer.specs[name] for path, layer in layers.items()}
    about = {
        "parts": {part: config.model_dump(mode="json") for part, config in record.parts.items()},
        "lora_layers": [path for path, spec in specs.items() if not spec.use_dora] if dora else [],
    }
    return (
        tensors,
        peft_config(getattr(model, "name_or_path", None) or None, specs, record.whole, dora),
        {"format": "pt", "mmdora": json.dumps(about)},
    )


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Put the adapter of a directory (ours or PEFT's) on `model`, trainable and active.

    Everything is checked before anything changes. Raises UserError that names the file and the tensor at fault.
    """
    if name in records(model):
        raise UserError(f"the model already has an adapter named {name!r}; give the new one another name")
    adapter = read_adapter(Path(folder))
    _check_fits(model, adapter)
    model.requires_grad_(False)
    for path, spec in adapter.specs.items():
        layer = wrap(model, path)
        layer.add_adapter(name, spec)
        for suffix, parameter in layer.adapter_tensors(name).items():
            _copy(parameter, adapter.layers[path][suffix])
    parameters = dict(model.named_parameters())
    for key, tensor in adapter.whole.items():
        _copy(parameters[key], tensor)
        parameters[key].requires_grad_(True)
    records(model)[name] = AdapterRecord(adapter.parts, adapter.whole_paths)
    set_adapter(model, name)


def load_weights(model: nn.Module, folder: Path, name: str = "default") -> None:
    """Copy a directory's tensors into an adapter that the model already has. Raises UserError where they do not fit."""
    adapter = read_adapter(folder)
    _check_fits(model, adapter)
    layers = dict(adapter_layers(model, name))
    if set(layers) != set(adapter.specs):
        odd = sorted(set(layers) ^ set(adapter.specs))[0]
        raise UserError(f"{folder}: made with other `parts` than this run's: {odd} is adapted in only one of the two")
    parameters = dict(model.named_parameters())
    for path, layer in layers.items():
        for suffix, parameter in layer.adapter_tensors(name).items():
            _copy(parameter, adapter.layers[path][suffix])
    for key, tensor in adapter.whole.items():
        _copy(parameters[key], tensor)


def merge_adapters(model: nn.Module, name: str | None = None) -> nn.Module:
    """Fold the active adapter (or `name`) into the weights, in place, and return the model without adapter code."""
    if name is not None:
        set_adapter(model, name)
    for path, layer in list(adapter_layers(model)):
        parent, _, leaf = path.rpartition(".")
        plain = layer.merge(layer.active) if layer.active is not None else layer.unwrap()
        setattr(model.get_submodule(parent), leaf, plain)
    records(model).clear()
    return model


def _check_fits(model: nn.Module, adapter: Adapter) -> None:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for path, spec in adapter.specs.items():
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            there = "is not in this model" if module is None else f"is a {type(module).__name__}, not a linear layer"
            raise UserError(f"{adapter.folder}: made for another model: {path} {there}")
        shapes = {
            "lora_A.weight": (spec.rank, module.in_features),
            "lora_B.weight": (module.out_features, spec.rank),
            "lora_magnitude_vector": (module.out_features,),
        }
        for suffix, tensor in adapter.layers[path].items():
            if tuple(tensor.shape) != shapes[suffix]:
                raise UserError(
                    f"{adapter.folder}: tensor {PREFIX}{path}.{suffix} has shape {list(tensor.shape)}; "
                    f"this model needs {list(shapes[suffix])}"
                )
    for key, tensor in adapter.whole.items():
        shape = _true_shape(parameters[key]) if key in parameters else None
        if shape != tuple(tensor.shape):
            wanted = "has no such parameter" if shape is None else f"needs {list(shape)}"
            raise UserError(
                f"{adapter.folder}: tensor {PREFIX}{key} has shape {list(tensor.shape)}; this model {wanted}"
            )


def _true_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def _copy(parameter: nn.Parameter, tensor: Tensor) -> None:
    with gathered([parameter], write=True):
        parameter.copy_(tensor)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; it takes the place of `folder` once everything is written."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            shutil.rmtree(folder)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
