"""Weight decomposition analysis (arXiv 2402.09353, section 3.2): how much fine-tuning changed each layer's magnitude
and direction.

In the paper the two changes correlate negatively for full fine-tuning (−0.62), positively for LoRA (+0.83), and
negatively for DoRA (−0.31).
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
    """Return (ΔM, ΔD) of one weight [out, in], computed in fp64."""
    v, w = before.double(), after.double()
    magnitude = (w.norm(dim=1) - v.norm(dim=1)).abs().mean()
    direction = (1 - F.cosine_similarity(v, w, dim=1)).mean()
    return float(magnitude), float(direction)


@torch.no_grad()
def analyze(model: nn.Module) -> list[LayerChange]:
    """Return ΔM and ΔD of every layer with an active adapter."""
    changes = []
    for path, layer in adapter_layers(model):
        if layer.active is not None:
            changes.append(
                LayerChange(path, *decompose(layer.matrix().flatten(0, -2), layer.merged(layer.active).flatten(0, -2)))
            )
    return changes


def correlation(changes: list[LayerChange]) -> float:
    """Return Pearson's correlation of ΔD and ΔM over the layers; NaN for fewer than two layers."""
    if len(changes) < 2:
        return float("nan")
    return float(np.corrcoef([c.direction for c in changes], [c.magnitude for c in changes])[0, 1])
