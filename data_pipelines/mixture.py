"""How the samples of several sources make up an epoch: caps, weights and temperature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def generator(*names: object) -> np.random.Generator:
    """Random numbers that are the same for the same names, in every process."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def take(count: int, rule: str | None, seed: int, name: str) -> np.ndarray:
    """The rows of `count` that a rule takes, in order: `first:N`, `random:N`, `random:P%`; null: all of them."""
    if rule is None:
        return np.arange(count)
    how, _, amount = rule.partition(":")
    wanted = round(count * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    wanted = min(wanted, count)
    if how == "first":
        return np.arange(wanted)
    return np.sort(generator(seed, "take", name).permutation(count)[:wanted])


def shares(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[int]:
    """Samples of each source in an epoch: size × weight, raised to 1 / temperature, with the epoch's length kept.

    At 1 the sizes count as they are; above, small sources are shown more often, and large ones in part (mT5, T5:
    arXiv 1910.10683, §3.5.2).
    """
    amounts = np.array([size * weight for size, weight in zip(sizes, weights, strict=True)])
    raised = amounts ** (1 / temperature)
    return [int(n) for n in np.round(amounts.sum() * raised / raised.sum())]


def epoch(sizes: Sequence[int], amounts: Sequence[int], seed: int, names: Sequence[str]) -> np.ndarray:
    """An epoch's samples, numbered over all sources: each source whole as often as its amount holds it, then the rest
    drawn without repeating one. int64 [samples]."""
    parts, start = [], 0
    for i, (size, amount, name) in enumerate(zip(sizes, amounts, names, strict=True)):
        whole, rest = divmod(amount, size)
        drawn = generator(seed, "rest", i, name).permutation(size)[:rest]
        parts.append(start + np.concatenate([np.tile(np.arange(size), whole), drawn]))
        start += size
    return np.concatenate(parts).astype(np.int64)
