"""Intervals and tests: that they hold what they promise, by simulation and against their definitions."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from eval.benchmarks import Benchmark, Question, Score
from eval.metrics import Table, cluster_bootstrap, estimate, holm, mcnemar, paired_difference, wilson
from eval.scoring import figure, score_table

STUDIES = 300


def clustered(rng: np.random.Generator, clusters: int, each: int, mean: float) -> np.ndarray:
    """Right and wrong answers, [clusters, each], that agree within a cluster."""
    return (rng.random((clusters, each)) < rng.beta(10 * mean, 10 * (1 - mean), clusters)[:, None]).astype(float)


def names(clusters: int, each: int) -> list[str]:
    return [str(i) for i in range(clusters) for _ in range(each)]


def f1(totals):
    return 200 * totals["tp"] / (2 * totals["tp"] + totals["fp"] + totals["fn"])


def coverage(study) -> float:
    rng = np.random.default_rng(0)
    return sum(study(rng) for _ in range(STUDIES)) / STUDIES


def test_coverage_of_a_mean_over_clusters():
    def holds(rng):
        found = cluster_bootstrap(clustered(rng, 100, 4, 0.6).ravel().tolist(), names(100, 4))
        return found.low <= 60 <= found.high

    assert 0.91 <= coverage(holds) <= 0.985


@pytest.mark.parametrize("clusters", [8, 20])
def test_coverage_over_few_clusters(clusters):
    def holds(rng):
        found = cluster_bootstrap(clustered(rng, clusters, 20, 0.6).ravel().tolist(), names(clusters, 20))
        return found.low <= 60 <= found.high

    assert 0.91 <= coverage(holds) <= 0.985


def test_coverage_of_a_ratio_of_counts():
    """F1 of yes and no: half the answers are yes, 80% of which are found, and 30% of the others are called so."""
    truth = 200 * 0.4 / (2 * 0.4 + 0.15 + 0.1)

    def holds(rng):
        said = clustered(rng, 100, 2, 0.8), clustered(rng, 100, 2, 0.3)
        columns = {"tp": said[0], "fn": 1 - said[0], "fp": said[1]}
        table = Table({name: values.ravel().tolist() for name, values in columns.items()}, names(100, 2))
        found = estimate(table, f1)
        return found.low <= truth <= found.high

    assert 0.91 <= coverage(holds) <= 0.985


def paired(rng: np.random.Generator, gain: float) -> tuple[Table, Table]:
    """Two models' scores of the same 100 × 3 questions: what makes a picture hard makes it so for both."""
    hard = rng.beta(4, 4, 100)[:, None]
    tables = []
    for shift in (0.0, gain):
        values = (rng.random((100, 3)) < 0.8 * hard + shift).astype(float).ravel().tolist()
        tables.append(Table({"n": [1.0] * 300, "value": values}, names(100, 3)))
    return tables[0], tables[1]


def mean(totals):
    return 100 * totals["value"] / totals["n"]


def test_coverage_of_a_paired_difference():
    def holds(rng):
        found = paired_difference(*paired(rng, 0.1), mean)
        return found.low <= 10 <= found.high

    assert 0.91 <= coverage(holds) <= 0.985


def test_no_difference_is_seldom_called_one():
    def called(rng):
        found = paired_difference(*paired(rng, 0.0), mean)
        assert (found.p < 0.04) <= (not found.low <= 0 <= found.high)  # one tells what the other does
        return found.p < 0.05

    assert coverage(called) <= 0.085


def test_pairing_sees_what_two_intervals_cannot():
    a, b = paired(np.random.default_rng(1), 0.0)
    b.sums["value"] = a.sums["value"] + (np.arange(100) % 10 == 0)  # ten answers more, and none less
    found = paired_difference(a, b, mean)
    assert found.value == pytest.approx(100 * 10 / 300)
    assert found.low > 0
    assert found.p < 0.01
    alone = [estimate(table, mean) for table in (a, b)]
    assert alone[1].low < alone[0].high


@pytest.mark.parametrize("n", [0, 1, 2, 5, 12, 31])
def test_mcnemar_is_exact(n):
    for fewer in range(n + 1):
        tail = sum(comb(n, i) for i in range(min(fewer, n - fewer) + 1))
        assert mcnemar(fewer, n - fewer) == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2**n))), rel=1e-12)


def test_mcnemar_by_enumeration():
    """The p of 1 against 6 is the share of all 2^7 ways to toss seven coins that are as uneven."""
    tosses = sum(len(list(combinations(range(7), k))) for k in range(8) if abs(k - 3.5) >= 2.5)
    assert mcnemar(1, 6) == pytest.approx(tosses / 2**7)


def test_mcnemar_of_tens_of_thousands():
    n, fewer = 40_000, 19_700
    term = tail = comb(n, fewer)
    for i in range(fewer, fewer - 1500, -1):  # what lies below is under 1e-60 of the tail
        term = term * i // (n - i + 1)
        tail += term
    assert mcnemar(fewer, n - fewer) == pytest.approx(float(Fraction(2 * tail, 2**n)), rel=1e-8)
    assert mcnemar(50_000, 50_000) == 1
    assert mcnemar(0, 100_000) == 0  # under the least number that a float holds


def test_mcnemar_is_under_five_percent_at_most_so_often():
    rng = np.random.default_rng(0)
    only_a = rng.binomial(60, 0.5, 4000)
    assert 0.02 <= np.mean([mcnemar(int(k), 60 - int(k)) < 0.05 for k in only_a]) <= 0.05


def test_holm_by_its_definition():
    """The smallest of m is multiplied by m, the next by m - 1 …, and none is smaller than one before it."""
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    ps = np.random.default_rng(0).random(9).tolist()
    ordered = sorted(ps)
    for p, adjusted in zip(ps, holm(ps), strict=True):
        steps = [(9 - i) * q for i, q in enumerate(ordered) if q <= p]
        assert adjusted == pytest.approx(min(1, max(steps)))


def test_holm_rejects_seldom_where_nothing_differs():
    rng = np.random.default_rng(0)
    assert np.mean([min(holm(rng.random(10))) < 0.05 for _ in range(2000)]) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    ("values", "clusters", "expected"),
    [
        ([1.0], ["a"], (100, 100 * wilson(1.0, 1)[0], 100)),
        ([0.0], ["a"], (0, 0, 100 * wilson(0.0, 1)[1])),
        ([1.0] * 50, names(50, 1), (100, 100 * wilson(1.0, 50)[0], 100)),
        ([1.0, 0.0] * 3, ["a"] * 6, (50, 0, 100)),  # one picture: what other pictures would show is unknown
        ([1.0, 0.0] * 500, names(500, 2), (50, 50 - 100 * wilson(0.0, 500)[1], 50 + 100 * wilson(0.0, 500)[1])),
    ],
)
def test_where_no_draw_shows_any_spread(values, clusters, expected):
    """The interval is then what the share of pictures that may be unlike all those seen could still change."""
    found = cluster_bootstrap(values, clusters)
    assert (found.value, found.low, found.high) == pytest.approx(expected)
    assert found.low < found.high


def test_a_figure_without_bounds_has_no_interval_where_nothing_is_known():
    table = Table({"tp": [1.0, 2.0], "fp": [0.0, 1.0], "fn": [1.0, 0.0]}, ["a", "a"])
    found = estimate(table, f1, bounds=None)
    assert found.value == 75
    assert (found.low, found.high) == (None, None)
    assert estimate(Table({"tp": [0.0], "fp": [0.0], "fn": [0.0]}, ["a"]), f1) is None  # no number at all


def test_equal_answers_are_no_difference_but_may_become_one():
    table = Table({"n": [1.0] * 40, "value": [1.0, 0.0] * 20}, names(40, 1))
    found = paired_difference(table, table, mean)
    assert (found.value, found.p) == (0, 1)
    assert found.low == pytest.approx(-100 * wilson(0.0, 40)[1])
    assert found.high == -found.low


@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
def test_few_pictures_cannot_show_much(clusters):
    """All to B: as k coins that all fall to one side, or more likely."""
    a = Table({"n": [1.0] * 60, "value": [0.0] * 60}, [str(i % clusters) for i in range(60)])
    b = Table({"n": [1.0] * 60, "value": [1.0] * 60}, [str(i % clusters) for i in range(60)])
    assert 2 / 2**clusters <= paired_difference(a, b, mean).p <= 1


def test_a_benchmark_of_counts_knows_its_bounds():
    class Points(Benchmark):
        bounds = (0.0, 2000.0)

        def questions(self, config):
            return []

        def score(self, response, question):
            return Score(1.0, 1.0)

        def headline(self, totals, kind):
            return 2000 * totals[kind] / totals["n"]

    asked = [Question(str(i), None, ("yes",), str(i)) for i in range(10)]
    found = figure(Points(), asked, {q.id: Score(1.0, 1.0) for q in asked}, "official")
    assert found == {"value": 2000, "low": pytest.approx(2000 * wilson(1.0, 10)[0]), "high": 2000}
    table = score_table(
        [{"official": 1, "strict": 0, "counts": {"tp": 2}}, {"official": 0, "strict": 0, "counts": {}}], list("ab")
    )
    assert {name: float(total[0]) for name, total in table.whole().items()} == {
        "tp": 2,
        "official": 1,
        "strict": 0,
        "n": 2,
    }
