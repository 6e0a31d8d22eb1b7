"""`training.ema`: the exponential moving average of what is trained, which becomes the run's adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmdora.core.deepspeed import local_shard, shard_of, whole_of


class Average(TrainerCallback):
    """An fp32 average of each trainable parameter, of the partition that this process holds under ZeRO-3.

    After step t it forgets at the rate min(decay, (1 + t) / (10 + t)), so that the first steps do not stay in it
    (the warm-up of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.values: dict[Tensor, Tensor] = {}  # by parameter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self._parameters():
            if parameter not in self.values:  # a run that goes on has read them
                self.values[parameter] = local_shard(parameter).float().clone()

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rate = 1 - min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for parameter, value in self.values.items():
            value.lerp_(local_shard(parameter).float(), rate)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the average in the place of its weights, and is saved with it."""
        weights = {parameter: local_shard(parameter).clone() for parameter in self.values}
        self._put(self.values)
        for parameter, value in self.values.items():
            parameter.average = value  # type: ignore[attr-defined]  # in fp32, for `in_full`
        try:
            yield
        finally:
            self._put(weights)
            for parameter in self.values:
                del parameter.average  # type: ignore[attr-defined]

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The average of a parameter, whole; every process asks."""
        return whole_of(parameter, self.values[parameter])

    def write(self, parameter: nn.Parameter, average: Tensor) -> None:
        """Go on from what `read` gave, in any number of processes."""
        device = local_shard(parameter).device
        self.values[parameter] = shard_of(parameter, average).to(device, torch.float32, copy=True)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def _put(self, values: dict[Tensor, Tensor]) -> None:
        for parameter, value in values.items():
            local_shard(parameter).copy_(value)
