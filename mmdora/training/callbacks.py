"""What a run shows and writes while it trains: the progress bar, and metrics.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from mmdora.training.trainer import AdapterTrainer


class RunLog(TrainerCallback):
    """Rank 0's bar (loss, tokens/s, share of the time spent waiting for data, time left) and one JSON line a step in
    `metrics.jsonl`."""

    def __init__(self, metrics: Path, console: Console):
        self.metrics, self.console = metrics, console
        self.trainer: AdapterTrainer | None = None
        self.progress: Progress | None = None
        self._mark = (0.0, 0, 0.0)  # the clock, tokens and seconds waited at the last line
        self._begun = (0.0, 0.0)  # the clock and seconds waited at the first, which is behind the start-up

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = (time.perf_counter(), 0, 0.0)
        if not state.is_world_process_zero:
            return
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[waited]} wait"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
        )
        self.progress.add_task("", total=state.max_steps, completed=state.global_step, loss="–", speed="–", waited="–")
        self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        assert self.trainer is not None
        now, tokens, waited = time.perf_counter(), self.trainer.tokens_seen * args.world_size, self.trainer.waited
        seconds, new, idle = now - self._mark[0], tokens - self._mark[1], waited - self._mark[2]
        self._mark = (now, tokens, waited)
        if not self._begun[0]:
            self._begun = (now, waited)
        line = {
            "step": state.global_step,
            "epoch": round(logs.get("epoch", 0.0), 4),
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "tokens_per_second": round(new / seconds, 1),
            "seconds": round(seconds, 4),
            "seconds_waiting_for_data": round(idle, 4),
        }
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.progress is not None:
            task = self.progress.task_ids[0]
            share = (waited - self._begun[1]) / (now - self._begun[0]) if now > self._begun[0] else 0.0
            self.progress.update(
                task,
                completed=state.global_step,
                loss=f"{logs['loss']:.3f}",
                speed=f"{new / seconds:,.0f}",
                waited=f"{share:.1%}",
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also when training stops on an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
