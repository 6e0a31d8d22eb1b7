"""Trainer callbacks that record the metrics of each step, show progress, and schedule evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from mmdora.training.optimizer import optimizer_groups
from mmdora.training.progress import TrainingDisplay, training_display
from mmdora.training.reporting import Reports
from mmdora.training.trainer import AdapterTrainer


class MetricsCallback(TrainerCallback):
    """Sends one line per step and one per evaluation to the reports, and shows the progress in rank 0."""

    def __init__(self, trainer: AdapterTrainer, console: Console, reports: Reports):
        self.trainer, self.console, self.reports = trainer, console, reports
        self.parts = [group["name"] for group in optimizer_groups(trainer.model, trainer.run_config)]
        self.rates: list[float] = []  # learning rates of the last step, by optimizer group
        self.display: TrainingDisplay | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meter.restart()
        self.reports.rewind(state.global_step)
        if state.is_world_process_zero:
            self.display = training_display(self.console, state.max_steps, state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = kwargs["lr_scheduler"].get_last_lr()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        speeds = self.trainer.meter.read()
        if not state.is_world_process_zero:
            return
        line = {
            "step": state.global_step,
            "epoch": round(logs.get("epoch", 0.0), 4),
            "loss": finite(logs["loss"]),
            "grad_norm": finite(logs.get("grad_norm")),
            "learning_rate": logs.get("learning_rate"),
            "learning_rates": self.rates_of_parts(),
            **speeds,
        }
        if self.trainer.bad_steps.reason is not None:
            line["not_taken"] = self.trainer.bad_steps.reason
        self.reports.line(line)
        if self.display is not None:
            self.display.step(line)

    def rates_of_parts(self) -> dict[str, float]:
        """Return the learning rate of each part in the last step; the highest, if its blocks have different ones."""
        rates: dict[str, float] = {}
        for part, rate in zip(self.parts, self.rates, strict=True):
            rates[part] = max(rate, rates.get(part, 0.0))
        return rates

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            values = {name: finite(value) for name, value in (metrics or {}).items()}
            self.reports.line({"step": state.global_step, "eval": values})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show the progress of an evaluation in rank 0; yields `advance(n)`."""
        if self.display is None:
            yield lambda _: None
            return
        with self.display.bar(label, total) as advance:
            yield advance

    def close(self) -> None:
        """End the progress display, also when training stops with an error."""
        if self.display is not None:
            self.display.close()
            self.display = None


def finite(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else value


class EvaluateEvery(TrainerCallback):
    """Evaluates every `steps` steps and after the last one, but not if training was told to stop early."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = state.global_step % self.steps == 0 and not control.should_training_stop
        if due or state.global_step >= state.max_steps:
            control.should_evaluate = True
