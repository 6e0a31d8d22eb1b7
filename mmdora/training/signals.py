"""SIGTERM and Ctrl-C during training: the run stops after the step in progress.

Slurm, Kubernetes and launchers send SIGTERM before they kill a process.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any, Literal

from transformers import TrainerCallback

from mmdora.core.distributed import any_rank_each, is_main

# Seconds in which a second SIGINT is taken for the same Ctrl-C: wrappers such as `timeout` forward the signal that the
# terminal has sent to the whole process group already.
SAME_KEY_PRESS = 0.5
NOTICE = b"\nCtrl-C: training stops after this step and saves a checkpoint; press it again to stop at once\n"


class StopOnSignal(TrainerCallback):
    """Inside `with`, a signal to any process lets all of them finish the step, save a checkpoint and stop.

    Ctrl-C (SIGINT) always saves; a second one raises KeyboardInterrupt at once. SIGTERM saves if `on_sigterm` is
    `save`.
    """

    def __init__(self, on_sigterm: Literal["save", "stop"]):
        self.on_sigterm = on_sigterm
        self.received: signal.Signals | None = None  # by this process
        self.interrupted_at: float | None = None  # time of the first Ctrl-C
        self.stopped: signal.Signals | None = None  # agreed by all processes

    def __enter__(self) -> StopOnSignal:
        handled = (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def saves(self) -> bool:
        return self.stopped == signal.SIGINT or self.on_sigterm == "save"

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self.interrupted_at is None:
                self.interrupted_at = now
                if is_main():
                    os.write(2, NOTICE)  # sys.stderr may be in the middle of a write
            elif now - self.interrupted_at > SAME_KEY_PRESS:
                raise KeyboardInterrupt
        if self.received != signal.SIGINT:  # deepspeed's launcher sends SIGTERM after Ctrl-C
            self.received = signal.Signals(number)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree on a stop: launchers may signal the processes in different steps."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        flags = any_rank_each([self.received == number for number in numbers], args.device)
        for number, received in zip(numbers, flags, strict=True):
            if received and self.stopped is None:
                self.stopped = number
        if self.stopped is not None:
            control.should_training_stop = True
            control.should_save = control.should_save or self.saves

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do not take another step after an evaluation, which may have taken long."""
        self.on_step_end(args, state, control)
