"""`transformers.Trainer` for adapters: learning rates per part, checkpoints without the base, an audit of the first
steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from mmdora.adapters import adapter_layers
from mmdora.adapters.norms import fix_weights
from mmdora.architectures import find_parts
from mmdora.blocks import rate_factors
from mmdora.checkpoint import load_weights, save_adapter, save_best
from mmdora.config import PartConfig, RunConfig
from mmdora.rundir import RunDir
from mmdora.tokens import NEW_TOKENS, VALUES
from mmdora.training.audit import AUDITED_STEPS, Audit
from mmdora.training.batches import Batching, MicroBatches, as_workers_said, check_budgets
from mmdora.training.flops import work_of
from mmdora.training.meter import Meter
from mmdora.training.packing import packed_inputs
from mmdora.zero import read_in_forward, true_shape

log = logging.getLogger(__name__)


class NormsOnceAStep(TrainerCallback):
    """Weights do not change from a step's first micro-batch to its update: DoRA's norms are computed once for it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fix_weights(True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fix_weights(False)


class EpochOrder(TrainerCallback):
    """Tells the batches which epoch it is: also in the middle of one, where a run goes on from a checkpoint."""

    def __init__(self, batches: MicroBatches):
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches.set_epoch(int(state.epoch or 0))


class AdapterTrainer(Trainer):
    """Trains what `inject_adapters` left trainable."""

    optimizer: Any
    control: Any

    def __init__(self, config: RunConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.run_config = config
        self.meter = Meter(self.args.device, work_of(self.model))
        self.evaluator: Callable[[AdapterTrainer], dict[str, float]] | None = None
        self.audit: Audit | None = None
        self.add_callback(NormsOnceAStep)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().train(*args, **kwargs)
        finally:
            fix_weights(False)  # an error may have come in the middle of a step
        if self.audit is not None and self.state.global_step >= AUDITED_STEPS:
            for part in self.audit.idle:
                log.warning("parts.%s learnt nothing: no sample that the run saw reached it", part)
        return result

    def get_train_dataloader(self) -> DataLoader:
        """This process's own micro-batches. Raises UserError where `data.max_tokens` cannot be held."""
        args, dataset = self.args, self.train_dataset
        plan = batching(self.run_config, args.per_device_train_batch_size, args.world_size, dataset)
        batches = MicroBatches(plan, args.process_index)
        self.add_callback(EpochOrder(batches))
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, which are waited for and counted here. Raises UserError."""
        start = time.perf_counter()
        with as_workers_said():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self.meter.waited += time.perf_counter() - start
        self.meter.count(batches, getattr(self.data_collator, "fillers", {}))
        return batches, items

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over one group a part and decay; DeepSpeed takes it as it is, so nothing is compiled."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                optimizer_groups(self.model, self.run_config),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "attention_mask" not in inputs:  # a packed batch
            inputs = packed_inputs(self.model, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._audit()
        return super().training_step(*args, **kwargs)

    def _audit(self) -> None:
        if self.audit is None:
            groups = optimizer_groups(self.model, self.run_config)
            # A new token's row waits for the first sample that has the token.
            watched = [g for g in groups if g["lr"] > 0 and g["name"] != NEW_TOKENS]
            parts = {id(parameter): group["name"] for group in watched for parameter in group["params"]}
            self.audit = Audit(self.model, parts, self.args.device)
        self.audit.check(self.state.global_step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What the run's evaluator finds of the model as it is now, by name. Every process calls it."""
        assert self.evaluator is not None
        with self.meter.pause():
            metrics = self.evaluator(self)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Keep the adapter as the run's best where `training.best` says so: the least loss, or the highest score."""
        best = self.run_config.training.best
        if best is None or math.isnan(value := metrics[best]):
            return False
        known = self.state.best_metric
        if known is not None and (value >= known if best == "loss" else value <= known):
            return False
        self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        about = {"step": self.state.global_step, "metric": best, "value": value}
        save_best(self.model, RunDir(Path(self.run_config.training.output)).best, about)
        return True

    # Checkpoints hold the adapter and the optimizer's state, never the frozen base.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_adapter(self.model, Path(output_dir or self.args.output_dir) / "adapter")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint) / "adapter")

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.is_deepspeed_enabled:
            for _, layer in adapter_layers(self.model):
                read_in_forward(layer, [p for name in layer.specs for p in layer.adapter_tensors(name).values()])
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # Not strict: the frozen base is not in the checkpoint.
        self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        scheduler = torch.load(Path(resume_from_checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
        return prepared


def check_batches(config: RunConfig, micro: int, world: int, dataset: Any) -> None:
    """Raise UserError where `data.max_tokens` cannot be held in some epoch of the run."""
    plan = batching(config, micro, world, dataset)
    epochs = math.ceil(config.training.epochs)
    if config.training.max_steps is not None:
        epochs = math.ceil(config.training.max_steps / plan.steps)
    check_budgets(plan, epochs)


def batching(config: RunConfig, micro: int, world: int, dataset: Any) -> Batching:
    """How the run's batches, of at most `micro` samples a process, are made of the dataset.

    Its `lengths` (about, in tokens) and `kinds` (bits: 1 pictures, 2 videos) are for grouping and budgets alone.
    """
    data = config.data
    described = {}
    if data.group_by is not None or data.max_tokens is not None:
        most = data.max_length or np.iinfo(np.int64).max
        described = {
            "lengths": np.minimum(np.asarray(dataset.lengths, np.int64), most),
            "kinds": np.asarray(dataset.kinds),
        }
    return Batching(
        samples=len(dataset),
        batch_size=config.training.batch_size,
        micro_batch_size=micro,
        world=world,
        seed=config.training.seed,
        group_by=data.group_by,
        max_tokens=data.max_tokens,
        packed=data.packing,
        **described,
    )


def optimizer_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """AdamW groups: a part's own learning rate (by block, with `layer_decay`) and weight decay.

    Norms, biases, magnitudes and the rows of new tokens are not decayed.
    """
    settings = config.training
    regions = find_parts(model, config.parts)
    decays = {part: options.layer_decay for part, options in config.parts.items() if options.layer_decay != 1}
    factors = {part: rate_factors(model, part, regions[part], decay) for part, decay in decays.items()}
    groups: dict[tuple[str, bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(VALUES):
            part, options = NEW_TOKENS, PartConfig(method="full", weight_decay=0.0)
        else:
            inside = [part for part, region in regions.items() if region.holds(name)]
            part = max(inside, key=lambda p: len(regions[p].path))
            options = config.parts[part]
        is_matrix = len(true_shape(parameter)) >= 2
        decayed = is_matrix and ".lora_magnitude_vector." not in name  # a convolution's magnitude is [1, out, 1, 1]
        rate = settings.learning_rate if options.learning_rate is None else options.learning_rate
        rate *= factors[part][name] if part in factors else 1.0
        decay = settings.weight_decay if options.weight_decay is None else options.weight_decay
        group = {"params": [], "lr": rate, "weight_decay": decay if decayed else 0.0, "name": part}
        groups.setdefault((part, decayed, rate), group)["params"].append(parameter)
    return list(groups.values())
