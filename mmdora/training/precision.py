"""The precision of weights, unless DeepSpeed trains in half precision: its engines keep fp32 copies themselves."""

from __future__ import annotations

from itertools import chain

from torch import nn


def to_training_precision(model: nn.Module, autocast: bool) -> None:
    """Convert a model's weights for training, in place.

    Trained parameters are in fp32 whatever the model's dtype: in half precision AdamW's small updates would be rounded
    away, and in fp16 its epsilon is zero, so that the first step divides by zero. Autocast computes with half-precision
    copies of them. Without autocast all parts of the model must have one dtype, so frozen weights are converted too.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point() and (tensor.requires_grad or not autocast):
            tensor.data = tensor.data.float()
