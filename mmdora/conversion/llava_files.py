"""Read and check the files of LLaVA's own checkpoints (model_type `llava` or `llava_llama`).

There are three layouts: a whole model in shards; `mm_projector.bin` of stage 1; and a LoRA run, `adapter_model.*` with
`non_lora_trainables.bin`. The last two need a base: the language model or a whole checkpoint. A plain Llama, from which
stage 1 starts, is read too. Source of the layouts:
https://github.com/haotian-liu/LLaVA (llava/model/builder.py, llava/model/llava_arch.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdora.core.errors import UserError

Tensors = dict[str, Tensor]

BUFFERS = (".rotary_emb.inv_freq", ".position_ids")  # saved by older versions; the config determines them
FEATURES = {"patch": "default", "cls_patch": "full"}  # LLaVA's name -> Hugging Face's for what the projector reads
# LLaVA-1.5's settings, for a plain Llama whose projector the first stage will train.
LLAVA_1_5 = {"image_aspect_ratio": "pad", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises UserError with every setting that the stock LLaVA class does not support."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a checkpoint directory of LLaVA's code") from error
    if isinstance(config, dict) and config.get("model_type") == "llama":
        return config | LLAVA_1_5
    if not isinstance(config, dict) or "mm_hidden_size" not in config or "text_config" in config:
        raise UserError(f"{path}: not a checkpoint of LLaVA's own code, whose config has a top-level 'mm_hidden_size'")
    known: dict[str, tuple[Any, ...]] = {
        "model_type": ("llava", "llava_llama"),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": (None, *FEATURES),
        "image_aspect_ratio": (None, "square", "pad"),
        "mm_patch_merge_type": (None, "flat"),
        "mm_use_im_start_end": (None, False),
    }
    problems = [
        f"{key!r} is {config.get(key)!r}; supported: {', '.join(map(str, values))}"
        for key, values in known.items()
        if config.get(key) not in values
    ]
    if problems:
        raise UserError(f"{path}: this checkpoint cannot be converted:\n" + "\n".join(f"  {p}" for p in problems))
    return config


def read_layout(folder: Path, base: Path | None) -> tuple[str, Tensors]:
    """Return the layout and all tensors by their names in a whole checkpoint. Raises UserError."""
    lora = (folder / "adapter_config.json").is_file()
    projector = folder / ("non_lora_trainables.bin" if lora else "mm_projector.bin")
    if not lora and _shards(folder):
        if base is not None:
            raise UserError(f"{folder} is a whole model; leave out --base")
        return "whole model", _read_shards(folder)
    if not projector.is_file():
        raise UserError(
            f"{folder}: no {projector.name}"
            + ("" if lora else ", no model*.safetensors and no pytorch_model*.bin; nothing to convert")
        )
    kind = "LoRA" if lora else "projector"
    if base is None:
        raise UserError(f"{folder} contains only a {kind}; name the model that it was trained on with --base")
    if not _shards(base):
        raise UserError(f"--base: {base} has no model*.safetensors and no pytorch_model*.bin")
    own = {name.removeprefix("base_model.model."): tensor for name, tensor in _read_bin(projector).items()}
    return kind, _read_shards(base) | own


def _shards(folder: Path) -> list[Path]:
    """Return the weight files of a whole model: those that its index names, or all if there is no index."""
    for stem, pattern in (("model.safetensors", "model*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            try:
                return sorted(
                    {folder / Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: damaged ({error!r})") from error
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _read_shards(folder: Path) -> Tensors:
    files = _shards(folder)
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder}: files that its index names are missing: {', '.join(missing)}")
    tensors: Tensors = {}
    for file in files:
        tensors |= _read_bin(file) if file.suffix == ".bin" else _read_safetensors(file)
    return tensors


def _read_safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from error


def _read_bin(path: Path) -> Tensors:
    """Read the tensors of a pickle without running code."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler may raise any exception for hostile bytes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: damaged, or not a file of tensors ({reason[0]})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path}: damaged, or not a file of tensors (it contains something else)")
    return tensors


def check_tensors(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise one UserError with all tensors that are missing, unexpected or of the wrong shape."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected and not name.endswith(BUFFERS)]
    misshapen = [
        f"{name} {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{problem}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"{folder}: its tensors do not match its config:\n" + "\n".join(f"  {p}" for p in problems))
