"""`transformers.Trainer` for adapters: learning rates per part, checkpoints without the base, an audit of the first
steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from data_pipelines.encoding import IGNORED
from mmdora.adapters import adapter_layers
from mmdora.adapters.ops.norm_cache import fix_weights
from mmdora.adapters.save_load import save_adapter, save_best
from mmdora.core.config import RunConfig
from mmdora.core.deepspeed import begin_stage_0, give_back, partition, read_in_forward
from mmdora.core.run_directory import RunDir
from mmdora.models.new_tokens import NEW_TOKENS
from mmdora.training.audit import AUDITED_STEPS, Audit
from mmdora.training.bad_steps import BadSteps, GuardedAdamW
from mmdora.training.batches import MicroBatches, batching
from mmdora.training.checkpoints import Resumed, rotate, save_checkpoint
from mmdora.training.ema import Average
from mmdora.training.flops import work_of
from mmdora.training.loader_workers import start_worker, unwrapped_worker_errors
from mmdora.training.metrics import Meter
from mmdora.training.optimizer import optimizer_groups
from mmdora.training.packing import packed_inputs

# Before transformers had `loss_is_scaled_for_ga`, its Trainer divided the loss of some families by the micro-batches of
# a step, whoever had scaled it.
DIVIDES_AGAIN = not hasattr(Trainer, "loss_is_scaled_for_ga")

log = logging.getLogger(__name__)


class NormsOnceAStep(TrainerCallback):
    """Weights do not change from a step's first micro-batch to its update: DoRA's norms are computed once for it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fix_weights(True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fix_weights(False)


class EveryParameterSteps(TrainerCallback):
    """A step without a picture gives a vision encoder no gradient, and AdamW would leave it where it is. With several
    processes its gradient is zero instead, and its momentum goes on: so it does in one process too."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.deepspeed is None:  # else the engine has stepped already
            for parameter in kwargs["model"].parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)


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
        self.loss_is_scaled_for_ga = not DIVIDES_AGAIN  # by `compute_loss`
        self.meter = Meter(self.args.device, work_of(self.model))
        self.evaluator: Callable[[AdapterTrainer], dict[str, float]] | None = None
        self.audit: Audit | None = None
        vocabulary = self.model.config.get_text_config().vocab_size
        dataset: Any = self.train_dataset
        self.bad_steps = BadSteps(
            config.training.max_bad_steps,
            2 * math.log(vocabulary),
            lambda indices, reason: dataset.not_learnt(indices, reason),
        )
        self.resumed: Resumed | None = None
        self.add_callback(NormsOnceAStep)
        self.add_callback(self.bad_steps)
        self.average = Average(self.model, config.training.ema) if config.training.ema is not None else None
        if self.average is not None:
            self.add_callback(self.average)
        if (self.args.bf16 or self.args.fp16) and not self.is_deepspeed_enabled:  # which keeps fp32 copies itself
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()  # a bf16 weight is too coarse for AdamW's small steps
        self.add_callback(EveryParameterSteps)

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
        self.pop_callback(EpochOrder)  # of an earlier `train`
        self.add_callback(EpochOrder(batches))
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=start_worker,
            # Its own: workers' seeds would else be drawn from the generator that dropout draws from, once or twice
            # more where a run was resumed.
            generator=torch.Generator().manual_seed(args.seed),
        )
        return self.loader

    def end_workers(self) -> None:
        """End the processes that load samples. Left to the garbage collector, which may take their queues first, each
        is waited for in vain, five seconds long."""
        self.loader._iterator = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, which are waited for and counted here. Raises UserError."""
        start = time.perf_counter()
        with unwrapped_worker_errors():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self.meter.waited += time.perf_counter() - start
        self.meter.count(batches, getattr(self.data_collator, "fillers", {}))
        return batches, items

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over one group a part and decay; DeepSpeed takes it as it is, so nothing is compiled."""
        if self.optimizer is None:
            self.optimizer = GuardedAdamW(
                optimizer_groups(self.model, self.run_config),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
            self.optimizer.guard = self.bad_steps
        return self.optimizer

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Supervised tokens of a step's micro-batches, in all processes."""
        counts = [supervised(batch["labels"]) for batch in batch_samples]
        tokens = torch.stack(counts).sum().to(device) if counts else torch.zeros((), dtype=torch.long, device=device)
        return self.accelerator.gather(tokens).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the mean over all tokens of the step, times the number of processes, which
        gradients are averaged over."""
        indices = inputs.pop("index", None)  # of the samples in the dataset
        if "attention_mask" not in inputs:  # a packed batch
            inputs = packed_inputs(self.model, inputs)
        if self.model_accepts_loss_kwargs or num_items_in_batch is None:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            # Qwen's families, PaliGemma and Gemma 3 give the mean over their micro-batch, which may hold few tokens.
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            loss = loss * (supervised(inputs["labels"]) / num_items_in_batch * self.args.world_size)
        if torch.is_grad_enabled() and not loss.requires_grad:
            loss.requires_grad_()  # nothing that is trained was reached, as by text where the projector alone is
        if model.training:
            self.bad_steps.saw(loss, indices, last=self.accelerator.sync_gradients)
        if DIVIDES_AGAIN and not self.model_accepts_loss_kwargs:
            loss = loss * self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The loss as it is: the Trainer tells another where it is not finite."""
        if "loss" in logs:
            logs["loss"] = self.bad_steps.loss
        super().log(logs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._audit()
        return super().training_step(*args, **kwargs)

    def averaged(self) -> AbstractContextManager[None]:
        """The model as it is to be used: with `training.ema`, the average in the place of its weights."""
        return nullcontext() if self.average is None else self.average.applied()

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
        give_back(self.model_wrapped)  # small weights that ZeRO-3 keeps gathered would not be the average's
        with self.meter.pause(), self.averaged():
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
        with self.averaged():
            save_best(self.model, RunDir(Path(self.run_config.training.output)).best, about)
        return True

    # Checkpoints are our own (checkpoints.py): they hold the adapter and the optimizer's state, never the frozen base.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_adapter(self.model, Path(output_dir or self.args.output_dir) / "adapter")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        folder, state = Path(self.args.output_dir), self.state
        best = state.best_global_step
        if best is not None and (best == state.global_step or (folder / f"checkpoint-{best}").is_dir()):
            state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        save_checkpoint(self, folder / f"checkpoint-{state.global_step}")
        if self.args.process_index == 0:
            rotate(folder, state.global_step, self.run_config.training.keep, best)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        epochs_trained, steps_skipped = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # how often to save is this config's affair
        if self.state.global_step >= max_steps:  # else the Trainer would take one more step to find out
            return self.state.num_train_epochs, 0
        return epochs_trained, steps_skipped

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.resumed = Resumed(self, Path(resume_from_checkpoint))
        self.resumed.load_weights()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.is_deepspeed_enabled:
            for _, layer in adapter_layers(self.model):
                read_in_forward(layer, [p for name in layer.specs for p in layer.adapter_tensors(name).values()])
            if resume_from_checkpoint is not None:  # before the engine takes the weights over
                self._load_from_checkpoint(resume_from_checkpoint)
            if is_deepspeed_zero3_enabled():
                half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
                partition(self.model, half, self.args.device)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled:
            begin_stage_0(self.model_wrapped)
        if self.resumed is not None:
            self.resumed.load_rest()
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed is not None:
            self.resumed.load_random_state()


def supervised(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens of `labels` [rows, tokens] count in the loss: a row's first has none before it to follow from."""
    return (labels[..., 1:] != IGNORED).sum()
