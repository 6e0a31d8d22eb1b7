"""Statistics as pure functions on plain values; no torch, no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np

RESAMPLES = 2000
DRAWN_AT_ONCE = 100_000  # clusters: counts of more do not stay in a processor's cache, and take twice as long
PERCENT = (0.0, 100.0)
NORMAL = NormalDist()
Z = NORMAL.inv_cdf(0.975)

Totals: TypeAlias = Mapping[str, np.ndarray]  # sums over questions by name, each [draws]
Statistic: TypeAlias = Callable[[Totals], np.ndarray]  # sums -> figure, [draws]
Bounds: TypeAlias = tuple[float, float] | None  # between which a figure lies; None where it has no upper one


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval, in the figure's own unit; no interval where nothing is known of it."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference, with the two-sided p of there being none."""

    p: float


class Table:
    """Per-question numbers summed by cluster: whole clusters are drawn, since questions on one image or video stand or
    fall together."""

    def __init__(self, columns: Mapping[str, Sequence[float]], clusters: Sequence[str]) -> None:
        place = {name: i for i, name in enumerate(sorted(set(clusters)))}
        member = np.asarray([place[name] for name in clusters])
        self.clusters = len(place)
        self.sums = {
            name: np.bincount(member, weights=np.asarray(values, dtype=np.float64), minlength=self.clusters)
            for name, values in columns.items()
        }

    def whole(self) -> Totals:
        return {name: np.asarray([values.sum()]) for name, values in self.sums.items()}


def resampled(*tables: Table, seed: int = 0) -> Iterator[tuple[Totals, ...]]:
    """The totals of RESAMPLES draws of as many clusters as there are, some draws at a time. Several tables are of the
    same clusters, as two models' answers to the same questions are: what is drawn of one is drawn of all."""
    rng, clusters = np.random.default_rng(seed), tables[0].clusters
    sums = [np.stack(list(table.sums.values()), axis=1) for table in tables]  # [clusters, columns]
    at_once = max(1, DRAWN_AT_ONCE // clusters)
    for start in range(0, RESAMPLES, at_once):
        draws = min(at_once, RESAMPLES - start)
        drawn = rng.integers(clusters, size=(draws, clusters))
        drawn += clusters * np.arange(draws)[:, None]  # each draw's clusters have numbers of their own
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        yield tuple(dict(zip(t.sums, (times @ s).T, strict=True)) for t, s in zip(tables, sums, strict=True))


def estimate(table: Table, statistic: Statistic, bounds: Bounds = PERCENT) -> Estimate | None:
    """The statistic with its 95% interval by the cluster bootstrap; None where it is not a number, as a share of no
    answers."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(table.whole())[0])
        if np.isnan(value):
            return None
        figures = np.concatenate([statistic(totals) for (totals,) in resampled(table)])
    reach = None if bounds is None else bounds[1] - bounds[0]
    return Estimate(value, *_interval(value, figures, table.clusters, bounds, reach))


def paired_difference(a: Table, b: Table, statistic: Statistic, bounds: Bounds = PERCENT) -> Difference | None:
    """How far the statistic is higher over `b` than over `a`, two models' scores of the same questions in the same
    clusters: the same clusters are drawn for both. None where one of the two is not a number.

    p is twice the share of draws on the other side of no difference, corrected as the interval is: at least 0.001, for
    so many draws, and at least what k clusters can show, 2^(1-k), the chance that k coins all fall to one side.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(b.whole())[0] - statistic(a.whole())[0])
        if np.isnan(value):
            return None
        figures = np.concatenate([statistic(of_b) - statistic(of_a) for of_a, of_b in resampled(a, b)])
    figures = figures[~np.isnan(figures)]
    none = 1e-9 * max(1.0, abs(value))  # what rounding makes of no difference
    other_side = min(np.count_nonzero(figures <= none), np.count_nonzero(figures >= -none))
    share = min(0.5, (other_side + 1) / (len(figures) + 1))
    p = max(2 * NORMAL.cdf(NORMAL.inv_cdf(share) / _widening(a.clusters)), 2.0 ** (1 - a.clusters))
    reach = None if bounds is None else bounds[1] - bounds[0]
    low, high = _interval(value, figures, a.clusters, None if reach is None else (-reach, reach), reach)
    return Difference(value, low, high, min(1.0, p))


def cluster_bootstrap(values: Sequence[float], clusters: Sequence[str], bounds: Bounds = PERCENT) -> Estimate:
    """The mean of per-question scores in percent, with its 95% interval."""
    table = Table({"n": [1.0] * len(values), "value": values}, clusters)
    found = estimate(table, lambda totals: 100 * totals["value"] / totals["n"], bounds)
    assert found is not None, "a mean of no values"
    return found


def _interval(
    value: float, figures: np.ndarray, clusters: int, bounds: Bounds, reach: float | None
) -> tuple[float | None, float | None]:
    """The percentile interval of the figures drawn, at percentiles further out the fewer clusters there are.

    Where they show no spread (every answer right, or a single cluster), the figure may still be off: Wilson's upper
    bound for none in `clusters` draws is the share of clusters that may be unlike all those seen, and they could move
    the figure by that share of `reach`. For a figure without bounds there is no interval then.
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
    """How much too narrow a bootstrap of few clusters is (Hesterberg, 2015, "What Teachers Should Know about the
    Bootstrap": the expanded percentile interval): Student's t in place of the normal distribution, and the variance
    over k - 1. For 10 clusters 1.22, for 100 1.02."""
    if clusters == 1:
        return math.inf
    free = clusters - 1
    t = Z + 2.372 / free + 2.823 / free**2 + 2.556 / free**3 + 1.590 / free**4  # Cornish and Fisher's series, at 97.5%
    return t / Z * math.sqrt(clusters / free)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar's test (McNemar, 1947): that so unequal a split of the questions which just one
    of two models has right, or a more unequal one, comes of a fair coin. It takes questions to be independent."""
    fewer, n = min(only_a, only_b), only_a + only_b
    if n == 0:
        return 1.0
    steps = np.arange(fewer)
    tail = 1 + np.cumprod((fewer - steps) / (n - fewer + 1 + steps)).sum()  # P(X <= fewer) / P(X = fewer)
    most = math.lgamma(n + 1) - math.lgamma(fewer + 1) - math.lgamma(n - fewer + 1) - n * math.log(2)
    return min(1.0, 2 * math.exp(most) * float(tail))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for there being several (Holm, 1979): the chance that any of those is under 0.05 for which
    there is no difference is at most 5%."""
    order = np.argsort(ps, kind="stable")
    steps = np.asarray(ps)[order] * (len(ps) - np.arange(len(ps)))
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted.tolist()


def wilson(share: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's 95% interval for a share of `n` independent draws."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def majority_share(references: Sequence[str]) -> float:
    """How often the commonest reference answer occurs: what always saying it would score."""
    _, counts = np.unique(np.asarray(references), return_counts=True)
    return float(counts.max() / counts.sum())
