"""The whole of a run's YAML, and the rules between its sections."""

from __future__ import annotations

from pydantic import Field, model_validator

from mmdora.core.config.data import DataConfig
from mmdora.core.config.evaluation import EvaluationConfig
from mmdora.core.config.model import ModelConfig
from mmdora.core.config.part import PartConfig
from mmdora.core.config.section import Section
from mmdora.core.config.training import TrainingConfig
from mmdora.core.registry import nearest


class RunConfig(Section):
    """A run is one YAML with these sections."""

    model: ModelConfig = Field(description="Which model is fine-tuned.")
    parts: dict[str, PartConfig] = Field(
        min_length=1,
        description="How each part is fine-tuned: `vision`, `projector`, `language`, `lm_head`, `embeddings`, or a "
        "dotted module path. Parts that are not named stay frozen.",
    )
    data: DataConfig = Field(description="What it is trained on.")
    training: TrainingConfig = Field(description="How it is trained.")
    evaluation: list[EvaluationConfig] = Field(default=[], description="The benchmarks that it is scored on.")
    plugins: list[str] = Field(
        default=[], description="Python modules to import first: they register names that the config then uses."
    )

    @model_validator(mode="after")
    def _evaluation_names_are_unique(self) -> RunConfig:
        names = [entry.name for entry in self.evaluation]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two 'evaluation' entries are named {duplicates[0]!r}")
        return self

    @model_validator(mode="after")
    def _evaluation_during_training_is_consistent(self) -> RunConfig:
        every, best = self.training.evaluate_every, self.training.best
        during = [entry.name for entry in self.evaluation if entry.during]
        metrics = (["loss"] if self.data.validation else []) + during
        if reserved := {"loss", "seconds"} & set(during):
            raise ValueError(f"an 'evaluation' entry with 'during' cannot be named {reserved.pop()!r}; rename it")
        if every is None and best is not None:
            raise ValueError("'training.best' needs 'training.evaluate_every', the steps between evaluations")
        if every is None and metrics:
            key = "data.validation" if self.data.validation else "evaluation.*.during"
            raise ValueError(f"{key!r} needs 'training.evaluate_every', the steps between evaluations")
        if every is not None and not metrics:
            raise ValueError(
                "'training.evaluate_every' has nothing to evaluate: give 'data.validation', or an 'evaluation' entry "
                "with 'during: true'"
            )
        if self.training.patience is not None and best is None:
            raise ValueError("'training.patience' needs 'training.best', the metric that has to improve")
        if best is not None and best not in metrics:
            raise ValueError(
                f"'training.best' {best!r} is not evaluated during training.{nearest(best, metrics)} Available: "
                f"{', '.join(metrics)}"
            )
        return self
