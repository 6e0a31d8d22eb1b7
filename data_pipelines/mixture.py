"""How an epoch is mixed from several sources: caps (`take`), weights and temperature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def generator(*names: object) -> np.random.Generator:
    """Return a random generator seeded by names: the same names give the same numbers in every process."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def take(count: int, rule: str | None, seed: int, name: str) -> np.ndarray:
    """Return the indices, in ascending order, of the rows of `count` that a rule selects: `first:N`, `random:N`,
    `random:P%`, or None for all of them."""
    if rule is None:
        return np.arange(count)
    how, _, amount = rule.partition(":")
    wanted = round(count * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    wanted = min(wanted, count)
    if how == "first":
        return np.arange(wanted)
    return np.sort(generator(seed, "take", name).permutation(count)[:wanted])


def shares(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[int]:
    """Return the number of samples of each source in an epoch: size × weight, raised to the power 1 / temperature and
    rescaled so that the length of the epoch does not change.

    At temperature 1 each source has size × weight samples. At a higher temperature small sources are repeated more
    often, and only a part of large ones is used (T5, arXiv 1910.10683, section 3.5.2).
    """
    amounts = np.array([size * weight for size, weight in zip(sizes, weights, strict=True)])
    raised = amounts ** (1 / temperature)
    return [int(n) for n in np.round(amounts.sum() * raised / raised.sum())]


def epoch(sizes: Sequence[int], amounts: Sequence[int], seed: int, names: Sequence[str]) -> np.ndarray:
    """Return the samples of an epoch, numbered over all sources, int64 [samples].

    Each source is repeated whole as often as its amount allows; the rest is drawn without replacement.
    """
    parts, start = [], 0
    for i, (size, amount, name) in enumerate(zip(sizes, amounts, names, strict=True)):
        whole, rest = divmod(amount, size)
        drawn = generator(seed, "rest", i, name).permutation(size)[:rest]
        parts.append(start + np.concatenate([np.tile(np.arange(size), whole), drawn]))
        start += size
    return np.concatenate(parts).astype(np.int64)
