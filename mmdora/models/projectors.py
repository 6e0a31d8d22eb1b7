"""The projectors `mlp2x_gelu` and `linear` of composed models, inside the stock LLaVA-OneVision class.

`mlp2x_gelu` is the class's own projector. `linear` uses the first of its two layers; the activation and the second
layer are the identity. The second layer is saved as an identity matrix, which the stock class can load. Here it is a
buffer: it is never trained, and it costs no matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IDENTITY = "linear"  # what transformers calls the identity activation


class IdentityLinear(nn.Module):
    """The identity, with the state dict of an `nn.Linear` that computes it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("weight", torch.eye(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x


def make_linear(projector: Any) -> None:
    """Turn a two-layer projector into a single linear layer, in place."""
    projector.linear_2 = IdentityLinear(projector.linear_1.out_features)


def keep_linear(model: Any) -> None:
    """Turn the projector of a reloaded model back into a single linear layer if it was saved as one, in place."""
    if getattr(getattr(model, "config", None), "projector_hidden_act", None) != IDENTITY:
        return
    projector = getattr(getattr(model, "model", None), "multi_modal_projector", None)
    second = getattr(projector, "linear_2", None)
    if projector is None or not isinstance(second, nn.Linear) or second.bias is None:
        return
    identity = torch.eye(len(second.weight), dtype=second.weight.dtype, device=second.weight.device)
    if torch.equal(second.weight.data, identity) and not second.bias.any():
        make_linear(projector)
        projector.linear_2.to(second.weight.device, second.weight.dtype)
