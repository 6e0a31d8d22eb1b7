"""Statistics as pure functions on plain values; no torch, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

RESAMPLES = 2000
DRAWN_AT_ONCE = 10_000_000  # cluster counts in memory: VQAv2 has 40,504 images

Totals: TypeAlias = Mapping[str, np.ndarray]  # sums over questions by name, each [draws]
Statistic: TypeAlias = Callable[[Totals], np.ndarray]  # sums -> figure, [draws]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval, in the figure's own unit."""

    value: float
    low: float
    high: float


class Table:
    """Per-question numbers summed by cluster: whole clusters are drawn, since questions on one image or video stand or
    fall together."""

    def __init__(self, columns: Mapping[str, Sequence[float]], clusters: Sequence[str]) -> None:
        names, member = np.unique(np.asarray(clusters), return_inverse=True)
        self.clusters = len(names)
        self.sums = {
            name: np.bincount(member, weights=np.asarray(values, dtype=np.float64), minlength=self.clusters)
            for name, values in columns.items()
        }

    def whole(self) -> Totals:
        return {name: np.asarray([values.sum()]) for name, values in self.sums.items()}

    def resampled(self, seed: int = 0) -> Iterator[Totals]:
        """The totals of RESAMPLES draws of as many clusters as there are, some draws at a time. Tables with the same
        clusters and seed are drawn alike: so are two models' answers to the same questions."""
        rng = np.random.default_rng(seed)
        share = np.full(self.clusters, 1 / self.clusters)
        at_once = max(1, DRAWN_AT_ONCE // self.clusters)
        for start in range(0, RESAMPLES, at_once):
            draws = rng.multinomial(self.clusters, share, size=min(at_once, RESAMPLES - start))
            yield {name: draws @ values for name, values in self.sums.items()}


def estimate(table: Table, statistic: Statistic) -> Estimate | None:
    """The statistic with its 95% interval, a percentile interval of the cluster bootstrap; None where it is not a
    number, as a share of no answers."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(table.whole())[0])
        if np.isnan(value):
            return None
        figures = np.concatenate([statistic(totals) for totals in table.resampled()])
    low, high = (float(q) for q in np.nanquantile(figures, [0.025, 0.975]))
    return Estimate(value, min(low, value), max(high, value))


def cluster_bootstrap(values: Sequence[float], clusters: Sequence[str]) -> Estimate:
    """The mean of per-question scores (0 to 1) in percent, with its 95% interval.

    Where every question scores 0, or every one 1, no resampling can show any spread; the interval is then Wilson's for
    as many draws as there are clusters.
    """
    table = Table({"n": [1.0] * len(values), "value": values}, clusters)
    mean = float(np.mean(np.asarray(values, dtype=np.float64)))
    if mean in (0.0, 1.0) and len(set(values)) == 1:
        low, high = wilson(mean, table.clusters)
        return Estimate(100 * mean, 100 * min(low, mean), 100 * max(high, mean))
    found = estimate(table, lambda totals: 100 * totals["value"] / totals["n"])
    assert found is not None, "a mean of no values"
    return found


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval for a share of `n` independent draws."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def majority_share(references: Sequence[str]) -> float:
    """How often the commonest reference answer occurs: what always saying it would score."""
    _, counts = np.unique(np.asarray(references), return_counts=True)
    return float(counts.max() / counts.sum())
