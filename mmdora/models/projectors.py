"""The projectors of composed models, inside the stock LLaVA-OneVision class.

`mlp2x_gelu` is the class's own. `linear` is one layer: the class's first, with the identity as activation and as second
layer. The second layer's identity is written to the model's files, where the stock class reads it back, but it is no
parameter here: nothing trains it, and it costs no product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IDENTITY = "linear"  # transformers' name for no activation


class IdentityLinear(nn.Module):
    """x → x, with the files of an `nn.Linear` that does the same."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("weight", torch.eye(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x


def make_linear(projector: Any) -> None:
    """Turn a stock projector into a single linear layer, in place."""
    projector.linear_2 = IdentityLinear(projector.linear_1.out_features)


def keep_linear(model: Any) -> None:
    """A reloaded model whose projector is one linear layer gets it back as one, in place; others stay as they are."""
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
