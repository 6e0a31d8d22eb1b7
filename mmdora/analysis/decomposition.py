"""Weight decomposition analysis (§3.2 of arXiv 2402.09353): how far tuning moved each layer's magnitude and direction.

The paper finds that full fine-tuning moves the two in opposite measure (correlation −0.62), LoRA together (+0.83),
and DoRA more like full fine-tuning (−0.31).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdora.adapters import adapter_layers


@dataclass(frozen=True)
class LayerChange:
    """ΔM: mean |‖w'‖ − ‖w‖| over a layer's rows. ΔD: mean 1 − cos(w', w)."""

    path: str
    magnitude: float
    direction: float


def decompose(before: Tensor, after: Tensor) -> tuple[float, float]:
    """(ΔM, ΔD) of one weight [out, in], in fp64."""
    v, w = before.double(), after.double()
    magnitude = (w.norm(dim=1) - v.norm(dim=1)).abs().mean()
    direction = (1 - F.cosine_similarity(v, w, dim=1)).mean()
    return float(magnitude), float(direction)


@torch.no_grad()
def analyze(model: nn.Module) -> list[LayerChange]:
    """ΔM and ΔD of every layer with an active adapter."""
    changes = []
    for path, layer in adapter_layers(model):
        if layer.active is not None:
            changes.append(
                LayerChange(path, *decompose(layer.matrix().flatten(0, -2), layer.merged(layer.active).flatten(0, -2)))
            )
    return changes


def correlation(changes: list[LayerChange]) -> float:
    """Pearson's correlation of ΔD and ΔM over the layers; NaN for fewer than two."""
    if len(changes) < 2:
        return float("nan")
    return float(np.corrcoef([c.direction for c in changes], [c.magnitude for c in changes])[0, 1])
