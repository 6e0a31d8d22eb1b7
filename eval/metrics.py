"""Statistics: intervals, paired tests and adjusted p-values, as pure functions on plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np

RESAMPLES = 2000
DRAWN_AT_ONCE = 100_000  # clusters; larger arrays exceed a processor's cache and take twice as long
PERCENT = (0.0, 100.0)
NORMAL = NormalDist()
Z = NORMAL.inv_cdf(0.975)

Totals: TypeAlias = Mapping[str, np.ndarray]  # sums over questions by column name, each [draws]
Statistic: TypeAlias = Callable[[Totals], np.ndarray]  # totals -> figure, [draws]
Bounds: TypeAlias = tuple[float, float] | None  # the least and the largest possible figure; None without an upper bound


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval, in the figure's unit. The interval is None if it is unknown."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference, with the two-sided p-value of no difference."""

    p: float


class Table:
    """Per-question numbers summed by cluster.

    The bootstrap draws whole clusters, because answers to questions about one image or video are correlated.
    """

    def __init__(self, columns: Mapping[str, Sequence[float]], clusters: Sequence[str]) -> None:
        place = {name: i for i, name in enumerate(sorted(set(clusters)))}
        member = np.asarray([place[name] for name in clusters])
        self.clusters = len(place)
        self.sums = {
            name: np.bincount(member, weights=np.asarray(values, dtype=np.float64), minlength=self.clusters)
            for name, values in columns.items()
        }

    def whole(self) -> Totals:
        """Return the sums over all clusters, each [1]."""
        return {name: np.asarray([values.sum()]) for name, values in self.sums.items()}


def resampled(*tables: Table, seed: int = 0) -> Iterator[tuple[Totals, ...]]:
    """Yield the totals of RESAMPLES bootstrap draws, some draws at a time.

    Several tables must have the same clusters, such as two models' scores of the same questions: each draw takes the
    same clusters from all of them.
    """
    rng, clusters = np.random.default_rng(seed), tables[0].clusters
    sums = [np.stack(list(table.sums.values()), axis=1) for table in tables]  # [clusters, columns]
    at_once = max(1, DRAWN_AT_ONCE // clusters)
    for start in range(0, RESAMPLES, at_once):
        draws = min(at_once, RESAMPLES - start)
        drawn = rng.integers(clusters, size=(draws, clusters))
        drawn += clusters * np.arange(draws)[:, None]  # separate cluster numbers for each draw, for one bincount
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        yield tuple(dict(zip(t.sums, (times @ s).T, strict=True)) for t, s in zip(tables, sums, strict=True))


def estimate(table: Table, statistic: Statistic, bounds: Bounds = PERCENT) -> Estimate | None:
    """Return the statistic with its 95% interval from the cluster bootstrap.

    Return None if the statistic is undefined, such as a share of zero answers.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(table.whole())[0])
        if np.isnan(value):
            return None
        figures = np.concatenate([statistic(totals) for (totals,) in resampled(table)])
    reach = None if bounds is None else bounds[1] - bounds[0]
    return Estimate(value, *_interval(value, figures, table.clusters, bounds, reach))


def paired_difference(a: Table, b: Table, statistic: Statistic, bounds: Bounds = PERCENT) -> Difference | None:
    """Return how much higher the statistic is for `b` than for `a`: two models' scores of the same questions.

    Every draw takes the same clusters from both. Return None if one of the two statistics is undefined.

    The p-value is twice the share of draws on the other side of zero, corrected for few clusters as the interval is. It
    is at least 0.001 (2 / RESAMPLES, the resolution of the draws) and at least 2^(1-k) for k clusters: the chance that
    k fair coins all fall on one side.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(b.whole())[0] - statistic(a.whole())[0])
        if np.isnan(value):
            return None
        figures = np.concatenate([statistic(totals_b) - statistic(totals_a) for totals_a, totals_b in resampled(a, b)])
    figures = figures[~np.isnan(figures)]
    rounding = 1e-9 * max(1.0, abs(value))
    other_side = min(np.count_nonzero(figures <= rounding), np.count_nonzero(figures >= -rounding))
    share = min(0.5, (other_side + 1) / (len(figures) + 1))
    p = max(2 * NORMAL.cdf(NORMAL.inv_cdf(share) / _widening(a.clusters)), 2.0 ** (1 - a.clusters))
    reach = None if bounds is None else bounds[1] - bounds[0]
    low, high = _interval(value, figures, a.clusters, None if reach is None else (-reach, reach), reach)
    return Difference(value, low, high, min(1.0, p))


def cluster_bootstrap(values: Sequence[float], clusters: Sequence[str], bounds: Bounds = PERCENT) -> Estimate:
    """Return the mean of per-question scores in percent, with its 95% interval."""
    table = Table({"n": [1.0] * len(values), "value": values}, clusters)
    mean = estimate(table, lambda totals: 100 * totals["value"] / totals["n"], bounds)
    assert mean is not None, "a mean of no values"
    return mean


def _interval(
    value: float, figures: np.ndarray, clusters: int, bounds: Bounds, reach: float | None
) -> tuple[float | None, float | None]:
    """Return the percentile interval of the drawn figures. Few clusters use percentiles further out.

    If all draws are equal (every answer correct, or a single cluster), the figure is still uncertain. Wilson's upper
    bound for 0 of `clusters` is the share of clusters that may differ from all observed ones, and these can move the
    figure by that share of `reach`, the width of its bounds. A figure without bounds has no interval then.
    """
    tail = NORMAL.cdf(-Z * _widening(clusters))
    low, high = (float(q) for q in np.nanquantile(figures, [tail, 1 - tail]))
    if high - low > 1e-9 * max(1.0, abs(value)):
        return min(low, value), max(high, value)
    if bounds is None or reach is None or not bounds[0] <= value <= bounds[1]:
        return None, None
    unseen = wilson(0.0, clusters)[1] * reach
    return max(bounds[0], value - unseen), min(bounds[1], value + unseen)


def _widening(clusters: int) -> float:
    """Return the factor by which a bootstrap of few clusters is too narrow: 1.22 for 10 clusters, 1.02 for 100.

    This is the expanded percentile interval of Hesterberg (2015), "What Teachers Should Know about the Bootstrap":
    Student's t in place of the normal distribution, and k - 1 in place of k in the variance.
    """
    if clusters == 1:
        return math.inf
    dof = clusters - 1
    t = Z + 2.372 / dof + 2.823 / dof**2 + 2.556 / dof**3 + 1.590 / dof**4  # Cornish-Fisher series at 97.5%
    return t / Z * math.sqrt(clusters / dof)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (McNemar, 1947).

    It is the probability that fair coins split the questions which exactly one of two models answers correctly at least
    as unequally. Questions are assumed to be independent.
    """
    fewer, n = min(only_a, only_b), only_a + only_b
    if n == 0:
        return 1.0
    steps = np.arange(fewer)
    tail = 1 + np.cumprod((fewer - steps) / (n - fewer + 1 + steps)).sum()  # P(X <= fewer) / P(X = fewer)
    most = math.lgamma(n + 1) - math.lgamma(fewer + 1) - math.lgamma(n - fewer + 1) - n * math.log(2)
    return min(1.0, 2 * math.exp(most) * float(tail))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests (Holm, 1979).

    The probability that any test without a true difference has an adjusted p-value under 0.05 is at most 5%.
    """
    order = np.argsort(ps, kind="stable")
    steps = np.asarray(ps)[order] * (len(ps) - np.arange(len(ps)))
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted.tolist()


def wilson(share: float, n: int, z: float = Z) -> tuple[float, float]:
    """Return Wilson's 95% interval for a share of `n` independent draws."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def majority_share(references: Sequence[str]) -> float:
    """Return the majority baseline, 0 to 1: the share of the most frequent reference answer."""
    _, counts = np.unique(np.asarray(references), return_counts=True)
    return float(counts.max() / counts.sum())
