"""`transformers.Trainer` for adapters: learning rates per part, checkpoints without the base model, an audit of the
first steps."""

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

from data_pipelines.encoding import IGNORED
from mmdora.adapters import adapter_layers
from mmdora.adapters.ops.norm_cache import fix_weights
from mmdora.adapters.save_load import save_adapter, save_best
from mmdora.core.config import RunConfig
from mmdora.core.deepspeed import gather_in_forward, is_zero3_enabled, partition_model, release_gathered
from mmdora.core.deepspeed.optimizer_state import reset_stage_0_optimizer
from mmdora.core.distributed import is_main, rank, world_size
from mmdora.core.run_directory import RunDir
from mmdora.models.new_tokens import NEW_TOKENS
from mmdora.training.audit import AUDITED_STEPS, Audit
from mmdora.training.bad_steps import BadSteps, GuardedAdamW
from mmdora.training.batches import MicroBatches, batch_spec
from mmdora.training.checkpoints import Resumed, rotate, save_checkpoint
from mmdora.training.chunked_loss import ChunkedLoss
from mmdora.training.ema import Average
from mmdora.training.flops import flop_costs
from mmdora.training.loader_workers import start_worker, unwrapped_worker_errors
from mmdora.training.metrics import ThroughputMeter
from mmdora.training.optimizer import optimizer_groups
from mmdora.training.packing import packed_inputs
from mmdora.training.patience import Patience
from mmdora.training.precision import to_training_precision

# Versions of transformers without `loss_is_scaled_for_ga` divide the loss of some model families by the number of
# gradient accumulation steps, even if `compute_loss` has scaled it.
DIVIDES_AGAIN = not hasattr(Trainer, "loss_is_scaled_for_ga")

log = logging.getLogger(__name__)


class NormsOncePerStep(TrainerCallback):
    """Compute DoRA's norms once per step: weights do not change between its first micro-batch and its update."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fix_weights(True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fix_weights(False)


class ZeroMissingGradients(TrainerCallback):
    """Give every trainable parameter a gradient in every step.

    In a step without images a vision encoder has no gradient, and AdamW would skip it. With several processes its
    gradient is zero and its momentum continues; this makes one process behave the same.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.deepspeed is None:  # DeepSpeed's engine has already stepped
            for parameter in kwargs["model"].parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)


class EpochOrder(TrainerCallback):
    """Set the epoch of the batch sampler, also when a run resumes within an epoch."""

    def __init__(self, batches: MicroBatches):
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches.set_epoch(int(state.epoch or 0))


class AdapterTrainer(Trainer):
    """Trains the parameters that `inject_adapters` made trainable."""

    optimizer: Any
    control: Any

    def __init__(self, config: RunConfig, **kwargs: Any):
        super().__init__(**kwargs)
        self.run_config = config
        self.loss_is_scaled_for_ga = not DIVIDES_AGAIN  # by `compute_loss`
        self.chunked_loss = ChunkedLoss(self.model)
        self.meter = ThroughputMeter(self.args.device, flop_costs(self.model))
        self.evaluator: Callable[[AdapterTrainer], dict[str, float]] | None = None
        self.audit: Audit | None = None
        vocabulary = self.model.config.get_text_config().vocab_size
        dataset: Any = self.train_dataset
        self.bad_steps = BadSteps(
            config.training.max_bad_steps,
            2 * math.log(vocabulary),  # twice the loss of guessing
            lambda indices, reason: dataset.record_untrained(indices, reason),
        )
        self.resumed: Resumed | None = None
        self.patience = Patience(config.training.patience)
        self.add_callback(NormsOncePerStep)
        self.add_callback(self.bad_steps)
        self.average = Average(self.model, config.training.ema) if config.training.ema is not None else None
        if self.average is not None:
            self.add_callback(self.average)
        half_precision = self.args.bf16 or self.args.fp16
        if not (half_precision and self.is_deepspeed_enabled):  # that engine keeps fp32 copies
            to_training_precision(self.model, autocast=half_precision)
        self.add_callback(ZeroMissingGradients)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None:
            self.resumed = Resumed(self, Path(resume_from_checkpoint))
            self.patience.count = self.resumed.state.get("evaluations_since_best", 0)
        try:
            result = super().train(resume_from_checkpoint, **kwargs)
        finally:
            fix_weights(False)  # an error may occur within a step
        if self.audit is not None and self.state.global_step >= AUDITED_STEPS:
            for part in self.audit.unchanged_parts:
                log.warning("parts.%s was not trained: no sample of this run gave it a gradient", part)
        return result

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of this process's micro-batches. Raises UserError if a step exceeds `data.max_tokens`."""
        args, dataset = self.args, self.train_dataset
        spec = batch_spec(self.run_config, args.per_device_train_batch_size, world_size(), dataset)
        batches = MicroBatches(spec, rank())
        self.pop_callback(EpochOrder)  # from an earlier call of `train`
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
            # Otherwise workers' seeds are drawn from the generator of dropout, and once or twice more in a resumed run.
            generator=torch.Generator().manual_seed(args.seed),
        )
        return self.loader

    def end_workers(self) -> None:
        """Stop the data loader's workers.

        The garbage collector may delete their queues first; then each worker is waited for until a timeout of 5 s.
        """
        self.loader._iterator = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of a step; measure the data loading time and count the tokens."""
        start = time.perf_counter()
        with unwrapped_worker_errors():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self.meter.waited += time.perf_counter() - start
        self.meter.count(batches, getattr(self.data_collator, "fillers", {}))
        return batches, items

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW with a group per part and weight decay; DeepSpeed wraps it, so it compiles no optimizer."""
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
        """Return the number of supervised tokens in a step's micro-batches, over all processes."""
        counts = [num_supervised(batch["labels"]) for batch in batch_samples]
        tokens = torch.stack(counts).sum().to(device) if counts else torch.zeros((), dtype=torch.long, device=device)
        return self.accelerator.gather(tokens).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the micro-batch's share of the mean loss over all tokens of the step, times the number of processes.

        The factor undoes the averaging of gradients over processes.
        """
        indices = inputs.pop("index", None)  # of the samples in the dataset
        if "attention_mask" not in inputs:  # a packed batch
            inputs = packed_inputs(self.model, inputs)
        with self.chunked_loss.dividing_by(num_items_in_batch):
            if self.model_accepts_loss_kwargs or num_items_in_batch is None:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            else:
                # Qwen's families, PaliGemma and Gemma 3 return the mean over the micro-batch, which may be few tokens.
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
                loss = loss * (num_supervised(inputs["labels"]) / num_items_in_batch * world_size())
        if torch.is_grad_enabled() and not loss.requires_grad:
            loss.requires_grad_()  # no trainable parameter was used, e.g. text only when just the projector is trained
        if model.training:
            self.bad_steps.add_micro_batch(loss, indices, last=self.accelerator.sync_gradients)
        if DIVIDES_AGAIN and not self.model_accepts_loss_kwargs:
            loss = loss * self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the true loss: the Trainer replaces a loss that is not finite."""
        if "loss" in logs:
            logs["loss"] = self.bad_steps.loss
        super().log(logs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._audit()
        return super().training_step(*args, **kwargs)

    def averaged(self) -> AbstractContextManager[None]:
        """Use the moving average of `training.ema` inside the block, if there is one, in place of the weights."""
        return nullcontext() if self.average is None else self.average.applied()

    def _audit(self) -> None:
        if self.audit is None:
            groups = optimizer_groups(self.model, self.run_config)
            # The row of a new token changes only once a sample has the token.
            watched = [g for g in groups if g["lr"] > 0 and g["name"] != NEW_TOKENS]
            parts = {id(parameter): group["name"] for group in watched for parameter in group["params"]}
            self.audit = Audit(self.model, parts, self.args.device)
        self.audit.check(self.state.global_step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the evaluator's metrics of the current model by name. Every process calls it."""
        assert self.evaluator is not None
        release_gathered(self.model_wrapped)  # small weights that ZeRO-3 keeps gathered would not be averaged
        with self.meter.pause(), self.averaged():
            metrics = self.evaluator(self)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save the adapter as the run's best if `training.best` improved: the lowest loss, or the highest score.

        End the training, with a checkpoint, when `training.patience` ends.
        """
        best = self.run_config.training.best
        if best is None:
            return False
        value, known = metrics[best], self.state.best_metric
        improved = not math.isnan(value) and (known is None or (value < known if best == "loss" else value > known))
        self.patience.add(improved, self.state.global_step)
        if self.patience.ended:
            self.control.should_training_stop = self.control.should_save = True
        if not improved:
            return False
        self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        about = {"step": self.state.global_step, "metric": best, "value": value}
        with self.averaged():
            save_best(self.model, RunDir(Path(self.run_config.training.output)).best, about)
        return True

    # Checkpoints (checkpoints.py) hold the adapter and the optimizer's state, never the frozen base model.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_adapter(self.model, Path(output_dir or self.args.output_dir) / "adapter")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        folder, state = Path(self.args.output_dir), self.state
        best = state.best_global_step
        if best is not None and (best == state.global_step or (folder / f"checkpoint-{best}").is_dir()):
            state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        save_checkpoint(self, folder / f"checkpoint-{state.global_step}")
        if is_main():
            rotate(folder, state.global_step, self.run_config.training.keep, best)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        epochs_trained, steps_skipped = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # save_steps of this config, not of the checkpoint
        # Otherwise the Trainer would take one more step.
        if self.state.global_step >= max_steps or self.patience.ended:
            return self.state.num_train_epochs, 0
        return epochs_trained, steps_skipped

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.resumed is not None
        self.resumed.load_weights()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.is_deepspeed_enabled:
            for _, layer in adapter_layers(self.model):
                gather_in_forward(layer, [p for name in layer.specs for p in layer.adapter_tensors(name).values()])
            self.chunked_loss.gather_head()
            if resume_from_checkpoint is not None:  # before DeepSpeed takes the weights over
                self._load_from_checkpoint(resume_from_checkpoint)
            if is_zero3_enabled():
                dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
                partition_model(self.model, dtype, self.args.device)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled:
            reset_stage_0_optimizer(self.model_wrapped)
        if self.resumed is not None:
            self.resumed.load_optimizer()
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed is not None:
            self.resumed.load_random_state()


def num_supervised(labels: torch.Tensor) -> torch.Tensor:
    """Return the number of tokens in `labels` [rows, tokens] that count in the loss; a row's first token never does."""
    return (labels[..., 1:] != IGNORED).sum()
