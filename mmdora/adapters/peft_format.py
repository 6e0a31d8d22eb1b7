"""Read and describe adapter directories in PEFT's layout. Nothing here touches a model.

`adapter_model.safetensors` holds `base_model.model.<path>.lora_A.weight` [r, in], `.lora_B.weight` [out, r] and
`.lora_magnitude_vector` [out] (embeddings: `.lora_embedding_A` and `_B`), and the weights of modules trained in full as
PEFT's `modules_to_save`. Settings that PEFT's config cannot express are in the file's metadata. A directory that PEFT
cannot compute at all has the `peft_type` `MMDORA`, so that PEFT refuses it.

A tied weight that is trained in full is written under each of its names, since PEFT trains one copy for each.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdora.adapters.spec import LowRankSpec
from mmdora.adapters.targets import pattern_value
from mmdora.core.config import PartConfig
from mmdora.core.errors import UserError
from mmdora.models.new_tokens import TOKEN_ADAPTER, VALUES

PREFIX = "base_model.model."
VERSION = 2  # of the metadata; in version 1 a tied weight that is trained in full may stand under one name for all
OWN_TYPE = "MMDORA"
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
SUFFIXES = (A, B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, "vera_lambda_d", "vera_lambda_b", "vera_A", "vera_B")
SPEC = TypeAdapter(LowRankSpec)
TOKENS = TypeAdapter(dict[str, int])
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False, lt=1e9)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
# PEFT's settings that are read here or do not change the computation. Any other setting that is set is refused.
KNOWN_SETTINGS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "eva_config", "qalora_group_size"),
    *("runtime_config", "trainable_token_indices", "mmdora_dropout", "ensure_weight_tying"),
}
# Initializations that do not change the base weights. With any other, the tensors belong to a changed base.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class _PeftSettings(BaseModel):
    """Types and defaults of PEFT's settings that are read here."""

    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Alpha = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = 0.0
    alpha_pattern: dict[str, Alpha] | None = None
    modules_to_save: list[str] | None = None
    use_dora: bool | None = False
    use_rslora: bool | None = False
    trainable_token_indices: list[TokenId] | dict[str, list[TokenId]] | None = None


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter directory."""

    folder: Path
    specs: dict[str, LowRankSpec]  # by layer path
    layers: dict[str, dict[str, Tensor]]  # low-rank tensors by layer path and suffix
    full_tensors: dict[str, Tensor]  # by parameter or buffer name: weights trained in full
    modules_to_save: list[str]  # the modules trained in full; PEFT may name them by the ends of their paths
    base_weights: dict[str, Tensor]  # by layer path: base weights, which PEFT saves with an adapted embedding
    parts: dict[str, PartConfig]
    vera_owners: dict[str, str]  # by layer path: the layer under whose name the shared `vera_A`, `vera_B` are saved
    token_rows: dict[str, dict[int, Tensor]]  # by table path and token id, ascending: rows of tokens
    new_tokens: dict[str, int]  # ids of the tokens that the run added to the vocabulary
    version: int  # of the metadata; PEFT's directories count as the newest
    frozen_adapter: str | None = None  # the adapter directory below this adapter, which the base model must include


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter directory and check it by itself. Raises UserError that names the file and the tensor."""
    config = _read_config(folder / "adapter_config.json")
    tensors, about = _read_tensors(folder)
    layers: dict[str, dict[str, Tensor]] = {}
    full_tensors: dict[str, Tensor] = {}
    base_weights: dict[str, Tensor] = {}
    token_rows: dict[str, dict[int, Tensor]] = {}
    copies: dict[str, Tensor] = {}  # with `save_embedding_layers`, PEFT writes embeddings trained in full twice
    for key, tensor in tensors.items():
        _check_tensor(folder, key, tensor)
        stem = key.removeprefix(PREFIX)
        suffix = next((s for s in SUFFIXES if stem.endswith(f".{s}")), None)
        if suffix:
            layers.setdefault(stem.removesuffix(f".{suffix}"), {})[suffix] = tensor
        elif stem.endswith(f".{VALUES}"):
            path = stem.removesuffix(f".{VALUES}")
            token_rows[path] = _token_rows(folder, path, tensor, config.get("trainable_token_indices"))
        elif stem.endswith((".base_layer.weight", ".original_module.weight")):
            path = stem.removesuffix(".base_layer.weight").removesuffix(".original_module.weight")
            base_weights[path.removesuffix(f".{TOKEN_ADAPTER}")] = tensor
        elif ".modules_to_save." in stem:
            copies[stem.replace(".modules_to_save.", ".")] = tensor
        elif re.search(r"(^|[._])(lora|dora|vera|hada|lokr|oft|ia3)_", stem):
            raise UserError(f"{folder}: tensor {key!r} belongs to an adapter type that is not supported")
        else:
            full_tensors[stem] = tensor
    for name, tensor in copies.items():
        if name not in full_tensors or not torch.equal(tensor, full_tensors[name]):
            raise UserError(f"{folder}: two different tensors are given for {PREFIX}{name}")
    if config.get("ensure_weight_tying") and (tied := [path for path, own in layers.items() if EMBEDDING_A in own]):
        raise UserError(
            f"{folder}: 'ensure_weight_tying' is set, and {tied[0]} has a low-rank adapter that shares its weights "
            "with the adapter of the head, which is not supported"
        )
    if both := sorted(set(token_rows) & set(layers)):
        raise UserError(f"{folder}: {both[0]} has token rows and a low-rank adapter; only one of them is supported")
    own_specs, parts, vera_owners, new_tokens = _read_metadata(folder, about)
    if config["peft_type"] == OWN_TYPE and (missing := sorted(set(layers) - set(own_specs))):
        raise UserError(f"{folder}: its 'mmdora' metadata has no settings for {missing[0]}")
    specs = {path: own_specs.get(path) or _spec(folder, path, own, config) for path, own in layers.items()}
    return Adapter(
        folder,
        specs,
        layers,
        full_tensors,
        list(config.get("modules_to_save") or []),
        base_weights,
        parts,
        vera_owners,
        token_rows,
        new_tokens,
        about.get("version", 1) if about else VERSION,
        config.get("frozen_adapter") if config["peft_type"] == OWN_TYPE else None,
    )


def _read_metadata(
    folder: Path, about: dict[str, Any]
) -> tuple[dict[str, LowRankSpec], dict[str, PartConfig], dict[str, str], dict[str, int]]:
    """Return specs, parts, VeRA owners and new tokens from the 'mmdora' metadata; all empty in PEFT's directories."""
    try:
        specs = {path: SPEC.validate_python(spec) for path, spec in about.get("specs", {}).items()}
        for spec in specs.values():
            _PeftSettings(r=max(spec.rank, 1), lora_alpha=spec.alpha, lora_dropout=spec.dropout)
            if spec.rank < 0:
                raise ValueError(f"rank {spec.rank}")
        parts = {part: PartConfig.model_validate(value) for part, value in about.get("parts", {}).items()}
        vera_owners = {str(path): str(owner) for path, owner in about.get("shared", {}).items()}
        new_tokens = TOKENS.validate_python(about.get("new_tokens", {}))
    except (AttributeError, ValueError) as error:
        raise UserError(f"{folder}: its 'mmdora' metadata is damaged ({error})") from error
    return specs, parts, vera_owners, new_tokens


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; an adapter directory must contain it") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", OWN_TYPE):
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path}: 'peft_type' must be LORA or {OWN_TYPE}, found {found!r}")
    try:
        _PeftSettings.model_validate(config)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: {key!r}: {error.errors()[0]['msg']}") from None
    if config["peft_type"] == OWN_TYPE:
        return config
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: 'bias' is {config['bias']!r}; only adapters that do not train biases are supported")
    if config.get("init_lora_weights") not in INITIALIZATIONS:
        raise UserError(
            f"{path}: 'init_lora_weights' is {config['init_lora_weights']!r}, which changed the base weights; "
            "convert it to a plain LoRA with PEFT first"
        )
    unknown = [key for key, value in config.items() if key not in KNOWN_SETTINGS and value]
    if unknown:
        raise UserError(f"{path}: {unknown[0]!r} is set ({config[unknown[0]]!r}), which is not supported")
    return config


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the 'mmdora' metadata. PEFT's old `adapter_model.bin` is read without executing code."""
    path, old = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if old.is_file() and not path.exists():
        try:
            tensors = torch.load(old, map_location="cpu", weights_only=True)
        except Exception as error:  # hostile bytes make torch's unpickler raise any type
            raise UserError(f"{old}: damaged or not a file of tensors ({error})") from error
        if not isinstance(tensors, dict) or not all(isinstance(k, str) for k in tensors):
            raise UserError(f"{old}: damaged or not a file of tensors (not a dictionary of named tensors)")
        return tensors, {}
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("mmdora", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, ValueError, OSError, RuntimeError, RecursionError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from error


def _check_tensor(folder: Path, key: str, tensor: Any) -> None:
    """Raise UserError for a tensor of another format, and for anything but dense, finite numbers."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise UserError(f"{folder}: {key!r} is not a dense tensor")
    if any(word in key for word in ("lora_", "vera_", "token_adapter")) and not tensor.is_floating_point():
        raise UserError(f"{folder}: tensor {key!r} has dtype {tensor.dtype}; an adapter needs floating-point numbers")
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise UserError(f"{folder}: tensor {key!r} contains NaN or infinity")
    if "dora_scale" in key or key.startswith(("lora_unet_", "lora_te_", "lycoris_")):
        raise UserError(
            f"{folder}: tensor {key!r} is in LyCORIS's format, whose DoRA normalizes the other axis of the weight; "
            "only PEFT's layout can be loaded"
        )
    if not key.startswith(PREFIX):
        raise UserError(f"{folder}: tensor {key!r} is not in PEFT's layout (the name should begin with {PREFIX!r})")


def _spec(folder: Path, path: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> LowRankSpec:
    """Return one layer's settings from PEFT's config, checked against its tensors."""
    dora = bool(config.get("use_dora"))
    a_name, b_name = (EMBEDDING_A, EMBEDDING_B) if EMBEDDING_A in tensors or EMBEDDING_B in tensors else (A, B)
    for suffix in (a_name, b_name, MAGNITUDE)[: 3 if dora else 2]:
        if suffix not in tensors:
            raise UserError(f"{folder}: tensor {PREFIX}{path}.{suffix} is missing")
    if not dora and MAGNITUDE in tensors:
        raise UserError(f"{folder}: tensor {PREFIX}{path}.{MAGNITUDE} exists, but 'use_dora' is false")
    a, b = tensors[a_name], tensors[b_name]
    if a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1]:
        shapes = f"{a_name.removesuffix('.weight')} {list(a.shape)}, {b_name.removesuffix('.weight')} {list(b.shape)}"
        raise UserError(f"{folder}: {PREFIX}{path}: {shapes} do not form a low-rank product")
    return LowRankSpec(
        rank=a.shape[0],
        alpha=float(pattern_value(config.get("alpha_pattern") or {}, path, config["lora_alpha"])),
        dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=dora,
        peft_dropout=dora,
    )


def _token_rows(folder: Path, path: str, tensor: Tensor, indices: Any) -> dict[int, Tensor]:
    """Return the rows of one table's tensor [k, d] by token id, ascending.

    `indices` is PEFT's `trainable_token_indices`: a dictionary by the end of the table's path, or a list, which is for
    the input embeddings.
    """
    by_table = indices if isinstance(indices, dict) else {path: indices or []}
    ids = next((ids for end, ids in by_table.items() if path == end or path.endswith(f".{end}")), [])
    if tensor.dim() != 2 or len(ids) != len(tensor) or len(set(ids)) != len(ids):
        raise UserError(
            f"{folder}: tensor {PREFIX}{path}.{VALUES} has shape {list(tensor.shape)}, and 'trainable_token_indices' "
            f"names {len(set(ids))} tokens for it"
        )
    return dict(sorted(zip(ids, tensor, strict=True), key=lambda row: row[0]))


def peft_config(
    base: str | None, specs: Mapping[str, LowRankSpec], modules_in_full: list[str], token_ids: Mapping[str, list[int]]
) -> dict[str, Any]:
    """Return `adapter_config.json` in PEFT's format.

    `use_rslora` is one flag for all layers. If the layers differ in it, it is false and alpha is converted so that
    alpha / r is each layer's scale.
    """
    dora = any(spec.use_dora for spec in specs.values())
    rslora = bool(specs) and all(spec.use_rslora for spec in specs.values())
    ranks = {path: max(spec.rank, 1) for path, spec in specs.items()}
    alphas = {path: s.alpha if rslora or not s.use_rslora else s.scale * s.rank for path, s in specs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 16.0
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max((spec.dropout for spec in specs.values()), default=0.0),
        "use_dora": dora,
        "use_rslora": rslora,
        "target_modules": sorted(specs),
        # PEFT matches a pattern with the end of a path, so the patterns are anchored.
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
        "modules_to_save": modules_in_full or None,
        "trainable_token_indices": dict(token_ids) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if any(spec.dropout and spec.use_dora and not spec.peft_dropout for spec in specs.values()):
        config["mmdora_dropout"] = "on the low-rank branch only; PEFT applies it to the base product too"
    return config


def own_config(
    base: str | None, specs: Mapping[str, LowRankSpec], modules_in_full: list[str], token_ids: Mapping[str, list[int]]
) -> dict[str, Any]:
    """Return `adapter_config.json` for adapters that PEFT has no layers for. PEFT refuses its `peft_type`."""
    methods = sorted({"dvora" if s.use_vera else "dora" if s.use_dora else "lora" for s in specs.values()})
    return {
        "peft_type": OWN_TYPE,
        "base_model_name_or_path": base,
        "methods": methods,
        "target_modules": sorted(specs),
        "modules_to_save": modules_in_full or None,
        "trainable_token_indices": dict(token_ids) or None,
    }


def metadata(
    specs: Mapping[str, LowRankSpec],
    parts: Mapping[str, PartConfig],
    vera_owners: Mapping[str, str],
    new_tokens: Mapping[str, int],
) -> dict[str, str]:
    """Return the metadata of the tensor file: each layer's exact settings, and the parts that they come from."""
    about = {
        "version": VERSION,
        "specs": {path: asdict(spec) for path, spec in specs.items()},
        "parts": {part: config.model_dump(mode="json") for part, config in parts.items()},
        "shared": dict(vera_owners),
        "new_tokens": dict(new_tokens),
    }
    return {"format": "pt", "mmdora": json.dumps(about)}
