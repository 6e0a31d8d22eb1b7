"""Adapter directories in PEFT's layout, both ways: save, load, merge.

`adapter_model.safetensors` holds `base_model.model.<path>.lora_A.weight` [r, in], `.lora_B.weight` [out, r] and
`.lora_magnitude_vector` [out], and the weights of parts trained in full as PEFT's `modules_to_save`. What PEFT's
config cannot say (which part used which method) is in the file's metadata, and where PEFT would misread it, the
tensors are written so that it computes the same: `use_dora` is one flag for the whole directory, so beside DoRA a
LoRA layer is written as DoRA with m = ‖W + sBA‖.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdora.adapters import AdapterLayer, LowRankSpec, adapter_layers
from mmdora.adapters.lora import wrap
from mmdora.config import PartConfig
from mmdora.errors import UserError
from mmdora.injection import AdapterRecord, records, set_adapter
from mmdora.zero import gathered

PREFIX = "base_model.model."
SUFFIXES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


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
        _peft_config(model, specs, record.whole, dora),
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


@dataclass(frozen=True)
class Adapter:
    """A directory as read: nothing of it has touched a model yet."""

    folder: Path
    specs: dict[str, LowRankSpec]  # by module path
    layers: dict[str, dict[str, Tensor]]  # by module path and PEFT's suffix
    whole: dict[str, Tensor]  # by parameter name: weights trained in full
    whole_paths: list[str]
    parts: dict[str, PartConfig]


def read_adapter(folder: Path) -> Adapter:
    """Read and check a directory by itself. Raises UserError that names the file and the tensor at fault."""
    config = _read_config(folder / "adapter_config.json")
    tensors, about = _read_tensors(folder / "adapter_model.safetensors")
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise UserError(f"{folder}: tensor {key!r} is not of PEFT's layout (it should begin with {PREFIX!r})")
        stem = key.removeprefix(PREFIX)
        suffix = next((s for s in SUFFIXES if stem.endswith(f".{s}")), None)
        if suffix:
            layers.setdefault(stem.removesuffix(f".{suffix}"), {})[suffix] = tensor
        elif "lora_" in stem or "dora_" in stem:
            raise UserError(f"{folder}: tensor {key!r} is of a kind that is not supported")
        else:
            whole[stem] = tensor
    as_lora = set(about.get("lora_layers", []))
    specs = {path: _spec(folder, path, found, config, path in as_lora) for path, found in layers.items()}
    parts = {part: PartConfig.model_validate(value) for part, value in about.get("parts", {}).items()}
    return Adapter(folder, specs, layers, whole, list(config.get("modules_to_save") or []), parts)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; an adapter directory holds it beside adapter_model.safetensors"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: 'peft_type' must be LORA, found {dict(config).get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: 'bias' is {config['bias']!r}; only adapters that leave biases alone are supported")
    return config


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("mmdora", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from error


def _spec(folder: Path, path: str, found: dict[str, Tensor], config: dict[str, Any], as_lora: bool) -> LowRankSpec:
    dora = bool(config.get("use_dora"))
    wanted = SUFFIXES if dora else SUFFIXES[:2]
    for suffix in wanted:
        if suffix not in found:
            raise UserError(f"{folder}: tensor {PREFIX}{path}.{suffix} is missing")
    if not dora and SUFFIXES[2] in found:
        raise UserError(f"{folder}: {PREFIX}{path}.{SUFFIXES[2]} is there, but 'use_dora' is false")
    a, b = found["lora_A.weight"], found["lora_B.weight"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        shapes = f"lora_A {list(a.shape)}, lora_B {list(b.shape)}"
        raise UserError(f"{folder}: {PREFIX}{path}: {shapes} do not form a low-rank product")
    # PEFT's own rule: the first pattern that matches the end of the path.
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)), config["lora_alpha"])
    dropout = float(config.get("lora_dropout") or 0.0)
    return LowRankSpec(a.shape[0], float(alpha), dropout, bool(config.get("use_rslora")), dora and not as_lora)


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


def _peft_config(model: nn.Module, specs: dict[str, LowRankSpec], whole: list[str], dora: bool) -> dict[str, Any]:
    """`adapter_config.json`. Where layers differ in rsLoRA, alpha is restated so that alpha / r is each layer's
    scale."""
    rslora = bool(specs) and all(spec.use_rslora for spec in specs.values())
    ranks = {path: spec.rank for path, spec in specs.items()}
    alphas = {
        path: spec.alpha if rslora or not spec.use_rslora else spec.scale * spec.rank for path, spec in specs.items()
    }
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 16.0
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max((spec.dropout for spec in specs.values()), default=0.0),
        "use_dora": dora,
        "use_rslora": rslora,
        "target_modules": sorted(specs),
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


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
