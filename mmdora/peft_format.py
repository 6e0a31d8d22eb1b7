"""Adapter directories in PEFT's layout, as data: nothing here touches a model.

`adapter_model.safetensors` holds `base_model.model.<path>.lora_A.weight` [r, in], `.lora_B.weight` [out, r] and
`.lora_magnitude_vector` [out], and the weights of parts trained in full as PEFT's `modules_to_save`. What PEFT's
config cannot say (which part used which method) is in the file's metadata.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdora.adapters import LowRankSpec
from mmdora.config import PartConfig
from mmdora.errors import UserError

PREFIX = "base_model.model."
SUFFIXES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


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


def peft_config(base: str | None, specs: dict[str, LowRankSpec], whole: list[str], dora: bool) -> dict[str, Any]:
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
        "base_model_name_or_path": base,
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
