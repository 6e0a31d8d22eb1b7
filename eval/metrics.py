"""Metrics as pure functions on plain values; no torch, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, all in percent."""

    value: float
    low: float
    high: float


def cluster_bootstrap(values: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Estimate:
    """The mean of per-question scores (0 to 1) in percent, with a 95% interval that resamples whole clusters.

    Questions on one image or video stand or fall together, so they are drawn together. Where every question scores
    the same, no resampling can show any spread; the interval is then Wilson's for as many draws as there are
    clusters.
    """
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    scores = np.asarray(values, dtype=np.float64)
    totals = np.bincount(member, weights=scores, minlength=len(names))
    counts = np.bincount(member, minlength=len(names)).astype(np.float64)
    mean = float(scores.mean())
    if np.all(scores == scores[0]) and mean in (0.0, 1.0):
        low, high = wilson(mean, len(names))
    else:
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
        means = (draws @ totals) / (draws @ counts)
        low, high = (float(q) for q in np.quantile(means, [0.025, 0.975]))
    return Estimate(100 * mean, 100 * min(low, mean), 100 * max(high, mean))


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval for a share of `n` independent draws."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def majority_share(references: Sequence[str]) -> float:
    """How often the commonest reference answer occurs: what always saying it would score."""
    _, counts = np.unique(np.asarray(references), return_counts=True)
    return float(counts.max() / counts.sum())
