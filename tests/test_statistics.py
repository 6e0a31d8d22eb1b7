"""Intervals and significance tests, checked by simulation and against their definitions."""

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
    """Draw correct and wrong answers, [clusters, each], correlated within a cluster."""
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
    """F1 of "yes": half the references are yes; 80% of these and 30% of the others are answered with yes."""
    truth = 200 * 0.4 / (2 * 0.4 + 0.15 + 0.1)

    def holds(rng):
        yes, no = clustered(rng, 100, 2, 0.8), clustered(rng, 100, 2, 0.3)  # answers to each kind of question
        columns = {"tp": yes, "fn": 1 - yes, "fp": no}
        table = Table({name: values.ravel().tolist() for name, values in columns.items()}, names(100, 2))
        found = estimate(table, f1)
        return found.low <= truth <= found.high

    assert 0.91 <= coverage(holds) <= 0.985


def paired(rng: np.random.Generator, gain: float) -> tuple[Table, Table]:
    """Draw two models' scores of the same 100 x 3 questions. Images are equally hard for both models."""
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


def test_false_positives_are_rare():
    def is_significant(rng):
        found = paired_difference(*paired(rng, 0.0), mean)
        assert (found.p < 0.04) <= (not found.low <= 0 <= found.high)  # p-value and interval agree
        return found.p < 0.05

    assert coverage(is_significant) <= 0.085


def test_pairing_detects_differences_within_overlapping_intervals():
    a, b = paired(np.random.default_rng(1), 0.0)
    b.sums["value"] = a.sums["value"] + (np.arange(100) % 10 == 0)  # ten more correct answers, none fewer
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
    """The p-value of 1 against 6 is the share of all 2^7 outcomes of seven coins that are at least as uneven."""
    tosses = sum(len(list(combinations(range(7), k))) for k in range(8) if abs(k - 3.5) >= 2.5)
    assert mcnemar(1, 6) == pytest.approx(tosses / 2**7)


def test_mcnemar_of_tens_of_thousands():
    n, fewer = 40_000, 19_700
    term = tail = comb(n, fewer)
    for i in range(fewer, fewer - 1500, -1):  # the remaining terms are under 1e-60 of the tail
        term = term * i // (n - i + 1)
        tail += term
    assert mcnemar(fewer, n - fewer) == pytest.approx(float(Fraction(2 * tail, 2**n)), rel=1e-8)
    assert mcnemar(50_000, 50_000) == 1
    assert mcnemar(0, 100_000) == 0  # underflows


def test_mcnemar_has_at_most_five_percent_false_positives():
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


def test_holm_has_five_percent_false_positives():
    rng = np.random.default_rng(0)
    assert np.mean([min(holm(rng.random(10))) < 0.05 for _ in range(2000)]) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    ("values", "clusters", "expected"),
    [
        ([1.0], ["a"], (100, 100 * wilson(1.0, 1)[0], 100)),
        ([0.0], ["a"], (0, 0, 100 * wilson(0.0, 1)[1])),
        ([1.0] * 50, names(50, 1), (100, 100 * wilson(1.0, 50)[0], 100)),
        ([1.0, 0.0] * 3, ["a"] * 6, (50, 0, 100)),  # one image says nothing about other images
        ([1.0, 0.0] * 500, names(500, 2), (50, 50 - 100 * wilson(0.0, 500)[1], 50 + 100 * wilson(0.0, 500)[1])),
    ],
)
def test_interval_if_all_draws_are_equal(values, clusters, expected):
    """The interval covers the change by a share of clusters that may differ from all observed ones."""
    found = cluster_bootstrap(values, clusters)
    assert (found.value, found.low, found.high) == pytest.approx(expected)
    assert found.low < found.high


def test_a_figure_without_bounds_has_no_interval_if_all_draws_are_equal():
    table = Table({"tp": [1.0, 2.0], "fp": [0.0, 1.0], "fn": [1.0, 0.0]}, ["a", "a"])
    found = estimate(table, f1, bounds=None)
    assert found.value == 75
    assert (found.low, found.high) == (None, None)
    assert estimate(Table({"tp": [0.0], "fp": [0.0], "fn": [0.0]}, ["a"]), f1) is None  # undefined


def test_equal_answers_have_an_interval_around_zero():
    table = Table({"n": [1.0] * 40, "value": [1.0, 0.0] * 20}, names(40, 1))
    found = paired_difference(table, table, mean)
    assert (found.value, found.p) == (0, 1)
    assert found.low == pytest.approx(-100 * wilson(0.0, 40)[1])
    assert found.high == -found.low


@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
def test_few_clusters_limit_significance(clusters):
    """B is always better: p is at least that of k coins that all fall on one side."""
    a = Table({"n": [1.0] * 60, "value": [0.0] * 60}, [str(i % clusters) for i in range(60)])
    b = Table({"n": [1.0] * 60, "value": [1.0] * 60}, [str(i % clusters) for i in range(60)])
    assert 2 / 2**clusters <= paired_difference(a, b, mean).p <= 1


def test_a_figure_of_counts_uses_the_benchmarks_bounds():
    class Points(Benchmark):
        bounds = (0.0, 2000.0)

        def questions(self, config):
            return []

        def score(self, response, question):
            return Score(1.0, 1.0)

        def headline(self, totals, kind):
            return 2000 * totals[kind] / totals["n"]

    questions = [Question(str(i), None, ("yes",), str(i)) for i in range(10)]
    found = figure(Points(), questions, {q.id: Score(1.0, 1.0) for q in questions}, "official")
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
