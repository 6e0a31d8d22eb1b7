"""SIGTERM, with which Slurm, Kubernetes and launchers announce that they will kill: the run ends after a whole step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Literal

from transformers import TrainerCallback

from mmdora.core.distributed import any_rank


class StopOnSigterm(TrainerCallback):
    """Inside `with`, SIGTERM to any process lets all of them finish the step, write a checkpoint (`save`) and stop."""

    def __init__(self, action: Literal["save", "stop"]):
        self.action = action
        self.received = False  # by this process
        self.stopped = False  # by agreement

    def __enter__(self) -> StopOnSigterm:
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any_rank(self.received):  # a launcher may reach the processes in different steps
            self.stopped = control.should_training_stop = True
            control.should_save = control.should_save or self.action == "save"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation may have taken long: no other step is taken after it."""
        self.on_step_end(args, state, control)
