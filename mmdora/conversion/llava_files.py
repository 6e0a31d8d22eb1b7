"""The files of LLaVA's own checkpoints (model_type `llava` or `llava_llama`, as LLaVA-1.5's code writes them): read,
named alike, and checked.

Three layouts: a whole model in shards; stage 1's `mm_projector.bin`; and a LoRA run, `adapter_model.*` with
`non_lora_trainables.bin`. The last two lie on a base: the language model, or a whole checkpoint. A plain Llama is read
too, as where stage 1 begins. Source of the layout:
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

BUFFERS = (".rotary_emb.inv_freq", ".position_ids")  # older versions saved them; they follow from the config
FEATURES = {"patch": "default", "cls_patch": "full"}  # LLaVA's names for what the projector reads, and Hugging Face's
# A Llama that has never seen a picture gets LLaVA-1.5's settings, for the first stage to train its projector.
NEW = {"image_aspect_ratio": "pad", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with everything in it that a stock LLaVA cannot be refused at once. Raises UserError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a directory that LLaVA's code wrote") from error
    if isinstance(config, dict) and config.get("model_type") == "llama":
        return config | NEW
    if not isinstance(config, dict) or "mm_hidden_size" not in config or "text_config" in config:
        raise UserError(f"{path}: not a checkpoint of LLaVA's own code, whose config has 'mm_hidden_size' at its top")
    known: dict[str, tuple[Any, ...]] = {
        "model_type": ("llava", "llava_llama"),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": (None, *FEATURES),
        "image_aspect_ratio": (None, "square", "pad"),
        "mm_patch_merge_type": (None, "flat"),
        "mm_use_im_start_end": (None, False),
    }
    problems = [
        f"{key!r} is {config.get(key)!r}; known: {', '.join(map(str, values))}"
        for key, values in known.items()
        if config.get(key) not in values
    ]
    if problems:
        raise UserError(f"{path} is of a kind that cannot be converted:\n" + "\n".join(f"  {p}" for p in problems))
    return config


def read_layout(folder: Path, base: Path | None) -> tuple[str, Tensors]:
    """Which layout it is, and all its tensors under the names that a whole checkpoint has; later files win."""
    lora = (folder / "adapter_config.json").is_file()
    projector = folder / ("non_lora_trainables.bin" if lora else "mm_projector.bin")
    if not lora and _shards(folder):
        if base is not None:
            raise UserError(f"{folder} is a whole model; leave out --base")
        return "whole model", _read_shards(folder)
    if not projector.is_file():
        raise UserError(
            f"{folder}: no {projector.name}"
            + ("" if lora else ", no model*.safetensors and no pytorch_model*.bin: nothing to convert")
        )
    kind = "LoRA" if lora else "projector"
    if base is None:
        raise UserError(f"{folder} holds a {kind} only; name the model that it was trained on with --base")
    if not _shards(base):
        raise UserError(f"--base: {base} has no model*.safetensors and no pytorch_model*.bin")
    own = {name.removeprefix("base_model.model."): tensor for name, tensor in _read_bin(projector).items()}
    return kind, _read_shards(base) | own


def _shards(folder: Path) -> list[Path]:
    """The files of a whole model; where an index names them, all that it names."""
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
    if lacking := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder}: its index names files that are not there: {', '.join(lacking)}")
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
    """A pickle as plain tensors, never as code."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever hostile bytes make it raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: damaged or not a file of tensors ({reason[0]})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path}: damaged or not a file of tensors (it holds something else than named ones)")
    return tensors


def check_tensors(folder: Path, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise one UserError for all tensors that are not as they should be."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not name.endswith(BUFFERS)]
    misshapen = [
        f"{name} {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"{folder}: its tensors are not its config's:\n" + "\n".join(f"  {p}" for p in problems))
