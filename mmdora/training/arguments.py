"""From a run's YAML to `transformers.TrainingArguments`, and to the DeepSpeed JSON that `training.deepspeed` names."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mmdora.core.config import RunConfig, TrainingConfig
from mmdora.core.config_files import read_deepspeed
from mmdora.core.distributed import world_size
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)


def training_arguments(config: RunConfig, output: Path) -> TrainingArguments:
    """Build these before the model is loaded: under ZeRO-3 their existence makes it load in partitions."""
    settings = config.training
    deepspeed = deepspeed_config(settings.deepspeed) if settings.deepspeed else None
    if config.model.quantization and deepspeed and deepspeed.get("zero_optimization", {}).get("stage") == 3:
        raise UserError("model.quantization: ZeRO-3 cannot partition quantized weights; take zero2 or less")
    if settings.ema is not None and deepspeed and _on_nvme(deepspeed, "offload_param"):
        raise UserError("training.ema: weights that are kept on NVMe cannot be averaged; take zero3_offload, or no ema")
    micro, accumulation = micro_batches(settings, world_size())
    half = config.model.dtype
    if half == "float16" and not deepspeed and not torch.cuda.is_available():
        half = "float32"  # no autocast: CPUs have it for bfloat16 alone
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.lr_scheduler, settings.lr_scheduler),
        warmup_steps=settings.warmup_ratio,  # below 1: a share of the steps
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=half == "bfloat16",
        fp16=half == "float16",
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",  # and always at the end
        save_steps=settings.save_every or sys.maxsize,
        logging_steps=1,
        report_to="none",  # mmdora.training.reporting does it
        run_name=output.name,
        deepspeed=deepspeed,
        dataloader_num_workers=config.data.num_workers,
        dataloader_persistent_workers=config.data.num_workers > 0,  # else each epoch starts them anew
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    use_one_gpu(arguments)
    return arguments


def use_one_gpu(arguments: TrainingArguments) -> None:
    """One process works on one GPU: left to itself, the Trainer spreads a batch over all of them by DataParallel, of
    which no part of this library knows."""
    if arguments.n_gpu > 1:
        log.warning("%d GPUs are here, and one is used: torchrun uses them all (docs/scaling.md)", arguments.n_gpu)
        arguments._n_gpu = 1


def micro_batches(settings: TrainingConfig, world: int) -> tuple[int, int]:
    """Samples that each of `world` processes holds at once, and how many such make its share of `batch_size`.

    Raises UserError where the batch cannot be split into whole ones.
    """
    micro = min(settings.micro_batch_size, max(1, settings.batch_size // world))
    if settings.batch_size % (micro * world):
        raise UserError(
            f"training.batch_size {settings.batch_size} cannot be split over {world} processes of "
            f"micro_batch_size {micro}; make it a multiple of {micro * world}"
        )
    return micro, settings.batch_size // (micro * world)


def deepspeed_config(name: str) -> dict[str, Any]:
    """A shipped DeepSpeed config by name (`zero2`), or one's own by path. Also readies this process for DeepSpeed.

    Raises UserError, also where the config wants a disk for its states and there is no way to one.
    """
    path, tree = read_deepspeed(name)
    _prepare_deepspeed()
    zero = tree.get("zero_optimization", {})
    on_disk = [zero[key] for key in ("offload_optimizer", "offload_param") if _on_nvme(tree, key)]
    for offload in on_disk:
        offload["nvme_path"] = _disk_folder(path, str(offload.get("nvme_path", "")))
    if on_disk:
        _check_async_io(path)
    return tree


def _on_nvme(tree: dict[str, Any], key: str) -> bool:
    return (tree.get("zero_optimization", {}).get(key) or {}).get("device") == "nvme"


def _disk_folder(path: Path, given: str) -> str:
    """The folder for what is offloaded to a disk; `${NAME}` in it is a variable of the environment."""
    folder = os.path.expandvars(given)
    if not given or "$" in folder:
        raise UserError(
            f"training.deepspeed: {path.name} keeps states on a local disk; set MMDORA_NVME to a folder there, on "
            "every node, as in `MMDORA_NVME=/local/nvme mmdora train …`"
        )
    if not Path(folder).is_dir():
        raise UserError(f"training.deepspeed: {path.name} keeps states in {folder}, and there is no such folder")
    return folder


def _check_async_io(path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    try:
        if not builder.is_compatible(verbose=False):
            raise RuntimeError("libaio is missing")
        builder.load(verbose=False)  # compiles it, where that was not done before
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"training.deepspeed: {path.name} needs DeepSpeed's async_io, which cannot be built here ({reason}): "
            "install libaio's headers (libaio-dev), a C++ compiler and ninja, or take zero3_offload"
        ) from error


def _prepare_deepspeed() -> None:
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Else init_distributed compiles a C++ op for shared-memory collectives, which wants a compiler and ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # started as plain `python`: a world of one, or DeepSpeed goes looking for MPI
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update(alone)
