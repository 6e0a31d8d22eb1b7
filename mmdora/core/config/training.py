"""`training`: the optimizer, its schedule, checkpoints and logging."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mmdora.core.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class TrainingConfig(Section):
    """The optimizer is AdamW. `batch_size` is global: gradient accumulation follows from it and the number of GPUs."""

    output: str = Field(description="The run directory.")
    seed: int = Field(default=0, description="Seeds the order of samples, new weights and dropout.")
    epochs: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Passes over the training data.")
    max_steps: PositiveInt | None = Field(
        default=None, description="Optimizer steps, instead of `epochs`; null means as many as `epochs` takes."
    )
    batch_size: PositiveInt = Field(default=32, description="Samples per optimizer step, over all processes.")
    micro_batch_size: PositiveInt = Field(
        default=8,
        description="Samples per forward pass of one process; a process's share of `batch_size` is the maximum.",
    )
    learning_rate: NonNegativeFloat = Field(
        default=2.0e-4, description="The peak learning rate of parts without their own."
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate changes after the warm-up."
    )
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.03, description="The share of the steps in which the learning rate rises from 0 to its peak."
    )
    warmup_steps: NonNegativeInt | None = Field(
        default=None, description="The number of these steps, instead of `warmup_ratio`; null means that share."
    )
    weight_decay: NonNegativeFloat = Field(
        default=0.0, description="For matrices; norms, biases, magnitudes and new tokens are not decayed."
    )
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.999, description="AdamW's decay of the second moment."
    )
    max_grad_norm: NonNegativeFloat = Field(
        default=1.0, description="Gradients are clipped to this norm; 0 means no clipping."
    )
    max_bad_steps: PositiveInt = Field(
        default=10,
        description="Steps with a NaN, infinite or exploding loss are skipped; the run stops after this many.",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Decay of an exponential moving average of the trained weights, which becomes the adapter.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    evaluate_every: PositiveInt | None = Field(
        default=None,
        description="Evaluate every N steps and after the last one; null means no evaluation during training.",
    )
    best: str | None = Field(
        default=None,
        description="Keep the best adapter in `best/`, by `loss` (of `data.validation`) or by the score of an "
        "`evaluation` entry, given by its name.",
    )
    patience: PositiveInt | None = Field(
        default=None,
        description="Stop the run once this many evaluations in a row have not improved `best`; null means never.",
    )
    save_every: PositiveInt | None = Field(
        default=None, description="Write a checkpoint every N steps; null means only after the last step."
    )
    keep: PositiveInt = Field(
        default=2, description="How many of the newest checkpoints to keep, besides the best one."
    )
    on_sigterm: Literal["save", "stop"] = Field(
        default="save",
        description="After SIGTERM, the step in progress is finished; then write a checkpoint, or just stop.",
    )
    deepspeed: str | None = Field(
        default=None,
        description="`zero1`, `zero2`, `zero3` ... ([scaling](scaling.md)) or the path of a DeepSpeed JSON.",
    )
    report_to: list[Literal["wandb", "tensorboard"]] = Field(
        default=[], description="Where metrics go besides `metrics.jsonl`; one name, or a list."
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _batches_are_whole(self) -> TrainingConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"'batch_size' {self.batch_size} must be a multiple of 'micro_batch_size' {self.micro_batch_size}"
            )
        return self
