"""`training.ema`: the exponential moving average of what is trained, which becomes the run's adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmdora.zero import local_shard, shard_of, whole_of


class Average(TrainerCallback):
    """An fp32 average of each trainable parameter, of the partition that this process holds under ZeRO-3.

    After step t it forgets at the rate min(decay, (1 + t) / (10 + t)), so that the first steps do not stay in it
    (the warm-up of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.values: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in self._parameters():
            if name not in self.values:  # a run that goes on has read them
                self.values[name] = local_shard(parameter).float().clone()

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rate = 1 - min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, parameter in self._parameters():
            self.values[name].lerp_(local_shard(parameter).float(), rate)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The model with the average in the place of its weights."""
        weights = {name: local_shard(p).clone() for name, p in self._parameters()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(weights)

    def read(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The average of a parameter, whole; every process is to ask."""
        return whole_of(parameter, self.values[name])

    def write(self, name: str, parameter: nn.Parameter, average: Tensor) -> None:
        """Go on from what `read` gave, in any number of processes."""
        mine = local_shard(parameter)
        self.values[name] = shard_of(parameter, average).to(mine.device, torch.float32, copy=True)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            local_shard(parameter).copy_(values[name])
