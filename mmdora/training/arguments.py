"""Translate a run's YAML to `transformers.TrainingArguments`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from mmdora.core.config import RunConfig, TrainingConfig
from mmdora.core.deepspeed import offloads_to_nvme, prepare_deepspeed_config, zero_stage
from mmdora.core.distributed import world_size
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)


def training_arguments(config: RunConfig, output: Path) -> TrainingArguments:
    """Return the run's `TrainingArguments`.

    Create them before the model is loaded: they start the process group, and under ZeRO-3 transformers loads models in
    partitions while they exist.

    Raises:
        UserError: the batch size cannot be split, or a setting cannot be combined with `training.deepspeed`.
    """
    settings = config.training
    deepspeed = prepare_deepspeed_config(settings.deepspeed) if settings.deepspeed else None
    if config.model.quantization and deepspeed and zero_stage(deepspeed) == 3:
        raise UserError("model.quantization: ZeRO-3 cannot partition quantized weights; use zero2 or a lower stage")
    if settings.ema is not None and deepspeed and offloads_to_nvme(deepspeed, "offload_param"):
        raise UserError("training.ema: cannot average weights that are offloaded to NVMe; use zero3_offload or no ema")
    micro_batch_size, accumulation_steps = micro_batches(settings, world_size())
    dtype = config.model.dtype
    if dtype == "float16" and not torch.cuda.is_available():
        log.warning("model.dtype: float16 training needs a GPU; on this CPU the model is trained in float32")
        dtype = "float32"  # neither accelerate's loss scaling nor DeepSpeed's fp16 engine runs on a CPU
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.lr_scheduler, settings.lr_scheduler),
        # A value below 1 is a share of the steps.
        warmup_steps=settings.warmup_ratio if settings.warmup_steps is None else settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",  # also saves at the end
        save_steps=settings.save_every or sys.maxsize,
        logging_steps=1,
        report_to="none",  # see mmdora.training.reporting
        run_name=output.name,
        deepspeed=deepspeed,
        dataloader_num_workers=config.data.num_workers,
        dataloader_persistent_workers=config.data.num_workers > 0,  # otherwise every epoch restarts them
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
    """Use one GPU per process. By default the Trainer applies DataParallel, which mmdora does not support."""
    if arguments.n_gpu > 1:
        log.warning("using 1 of %d GPUs; start with torchrun to use all of them (docs/scaling.md)", arguments.n_gpu)
        arguments._n_gpu = 1


def micro_batches(settings: TrainingConfig, world_size: int) -> tuple[int, int]:
    """Return (samples per micro-batch, gradient accumulation steps) of each process.

    Raises:
        UserError: `batch_size` cannot be split into whole micro-batches.
    """
    micro_batch_size = min(settings.micro_batch_size, max(1, settings.batch_size // world_size))
    if settings.batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"training.batch_size {settings.batch_size} cannot be split over {world_size} processes with "
            f"micro_batch_size {micro_batch_size}; make it a multiple of {micro_batch_size * world_size}"
        )
    return micro_batch_size, settings.batch_size // (micro_batch_size * world_size)
