"""DeepSpeed's JSON configs, the start of a process that uses DeepSpeed, and whether ZeRO-3 is on."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdora.core.config_files import find_path, shipped_path
from mmdora.core.errors import UserError
from mmdora.core.registry import nearest


def read_deepspeed_config(name: str) -> tuple[Path, dict[str, Any]]:
    """Return the file and the content of a shipped config (`zero2`) or of a JSON file. Imports no torch.

    Raises:
        UserError: the file does not exist, or is not a JSON object.
    """
    path = shipped_path(f"configs/deepspeed/{name}.json") or find_path(name)
    if not path.is_file():
        folder = shipped_path("configs/deepspeed")
        known = sorted(p.stem for p in folder.glob("*.json")) if folder else []
        raise UserError(
            f"training.deepspeed: no such config {name!r}.{nearest(name, known)} Shipped configs: {', '.join(known)}; "
            "or give the path of a JSON file"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"training.deepspeed: {path} is not valid JSON ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"training.deepspeed: {path} must hold a JSON object")
    return path, tree


def prepare_deepspeed_config(name: str) -> dict[str, Any]:
    """Return a config that is ready for `TrainingArguments`, and prepare this process for DeepSpeed.

    Raises:
        UserError: the config cannot be read, or offloads to NVMe and the folder or DeepSpeed's async_io is missing.
    """
    path, tree = read_deepspeed_config(name)
    prepare_process()
    zero = tree.get("zero_optimization", {})
    on_nvme = [zero[key] for key in ("offload_optimizer", "offload_param") if offloads_to_nvme(tree, key)]
    for offload in on_nvme:
        offload["nvme_path"] = _nvme_folder(path, str(offload.get("nvme_path", "")))
    if on_nvme:
        ensure_async_io(path)
    return tree


def zero_stage(tree: dict[str, Any]) -> int:
    return int(tree.get("zero_optimization", {}).get("stage", 0))


def offloads_to_nvme(tree: dict[str, Any], key: str) -> bool:
    """Return whether `offload_optimizer` or `offload_param` (the key) points to a disk."""
    return (tree.get("zero_optimization", {}).get(key) or {}).get("device") == "nvme"


def _nvme_folder(path: Path, value: str) -> str:
    """Return `nvme_path` with `${NAME}` replaced by environment variables. Raises UserError if there is no folder."""
    folder = os.path.expandvars(value)
    if not value or "$" in folder:
        raise UserError(
            f"training.deepspeed: {path.name} offloads to a local disk; set MMDORA_NVME to a folder on it, on every "
            "node, for example `MMDORA_NVME=/local/nvme mmdora train ...`"
        )
    if not Path(folder).is_dir():
        raise UserError(f"training.deepspeed: {path.name} offloads to {folder}, but there is no such folder")
    return folder


def ensure_async_io(path: Path) -> None:
    """Build DeepSpeed's async_io operator, which NVMe offload needs. Raises UserError if it cannot be built."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    try:
        if not builder.is_compatible(verbose=False):
            raise RuntimeError("libaio is missing")
        builder.load(verbose=False)  # compiles it the first time
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"training.deepspeed: {path.name} needs DeepSpeed's async_io, which cannot be built here ({reason}). "
            "Install libaio's headers (libaio-dev), a C++ compiler and ninja, or use zero3_offload"
        ) from error


def prepare_process() -> None:
    """Let DeepSpeed start in this process without a compiler and without a launcher."""
    import deepspeed.ops
    import torch

    if not torch.cuda.is_available():
        # Otherwise init_distributed compiles a C++ op for shared-memory collectives, which needs a compiler and ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # started as plain `python`: without these variables DeepSpeed looks for MPI
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        single_process = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update(single_process)


def quiet_deepspeed() -> None:
    """Show only DeepSpeed's errors on the terminal, and no warning that there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def is_zero3_enabled() -> bool:
    """Return whether ZeRO-3 `TrainingArguments` exist in this process."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def load_unpartitioned() -> Iterator[None]:
    """Load whole models inside the block, even if ZeRO-3 `TrainingArguments` exist.

    Evaluation needs a model that can generate on its own, and adapters read the weights that they are put on. The
    DeepSpeed engine partitions the model when training begins.
    """
    from transformers.integrations import deepspeed as hf

    active = hf._hf_deepspeed_config_weak_ref() if hf._hf_deepspeed_config_weak_ref is not None else None
    hf.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active is not None:
            hf.set_hf_deepspeed_config(active)
