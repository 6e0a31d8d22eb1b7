"""`training.ema`: an exponential moving average of the trained parameters, which becomes the run's adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmdora.core.deepspeed import gather_shards, local_shard, shard_of


class Average(TrainerCallback):
    """An fp32 average of each trainable parameter; under ZeRO-3, of this process's partition.

    The decay after step t is min(decay, (1 + t) / (10 + t)), so that the first steps do not dominate the average
    (the warm-up of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.averages: dict[Tensor, Tensor] = {}  # by parameter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in self._parameters():
            if parameter not in self.averages:  # a resumed run has loaded them
                self.averages[parameter] = local_shard(parameter).float().clone()

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weight = 1 - min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for parameter, average in self.averages.items():
            average.lerp_(local_shard(parameter).float(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the average in place of the weights inside the block, also when the model is saved."""
        weights = {parameter: local_shard(parameter).clone() for parameter in self.averages}
        self._copy(self.averages)
        for parameter, average in self.averages.items():
            parameter.average = average  # type: ignore[attr-defined]  # in fp32, for `full_parameter`
        try:
            yield
        finally:
            self._copy(weights)
            for parameter in self.averages:
                del parameter.average  # type: ignore[attr-defined]

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return the full average of a parameter. Every process calls it."""
        return gather_shards(parameter, self.averages[parameter])

    def write(self, parameter: nn.Parameter, average: Tensor) -> None:
        """Restore an average that `read` returned, from any number of processes."""
        device = local_shard(parameter).device
        self.averages[parameter] = shard_of(parameter, average).to(device, torch.float32, copy=True)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def _copy(self, values: dict[Tensor, Tensor]) -> None:
        for parameter, value in values.items():
            local_shard(parameter).copy_(value)
