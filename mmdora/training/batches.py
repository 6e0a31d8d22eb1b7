"""Which samples train together: every step's micro-batches, for all processes, from nothing but numbers and a seed.

A step always takes the next `batch_size` samples of the epoch's order, and always in the same number of micro-batches;
grouping and budgets only say which of them share one. So the gradient, which weighs every token alike, stays what it
is without them. The same seed and epoch give the same batches, whatever number of workers loads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from mmdora.core.config import RunConfig
from mmdora.core.errors import UserError

Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Batching:
    """How `samples` are split. `lengths` are tokens (estimates will do), `kinds` bits (1: pictures, 2: videos)."""

    samples: int
    batch_size: int  # samples a step, over all processes
    micro_batch_size: int  # a process's, at once; with a budget, on the mean
    world: int = 1  # processes
    seed: int = 0
    group_by: Literal["length", "modality"] | None = None
    max_tokens: int | None = None  # that a micro-batch holds at most
    packed: bool = False  # samples stand behind one another, and not padded beside one another
    lengths: Ints | None = None
    kinds: Ints | None = None

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.samples // self.batch_size)

    def groups(self, samples: int) -> int:
        """Micro-batches of all processes that a step of so many samples is split into: each process as many."""
        return -(-samples // (self.micro_batch_size * self.world)) * self.world


def epoch_order(samples: int, seed: int, epoch: int) -> Ints:
    """All of them in random order: the one that accelerate's seedable sampler gives."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(samples, generator=generator).numpy()


def step_samples(batching: Batching, epoch: int) -> Iterator[Ints]:
    """The samples of each step. The last has what is left, and repeats the epoch's first ones where that is too little
    to give every process as many micro-batches."""
    order = epoch_order(batching.samples, batching.seed, epoch)
    for start in range(0, batching.samples, batching.batch_size):
        step = order[start : start + batching.batch_size]
        if (missing := batching.groups(len(step)) - len(step)) > 0:
            step = np.concatenate([step, np.resize(order, missing)])
        yield step


def micro_batches_of(batching: Batching, step: Ints) -> list[Ints]:
    """One step's samples as micro-batches: the process of rank r takes every `world`-th from r on.

    Raises UserError where they cannot be split so that `max_tokens` holds.
    """
    if batching.group_by is not None:
        assert batching.lengths is not None
        assert batching.kinds is not None
        kinds = batching.kinds[step] if batching.group_by == "modality" else np.zeros(len(step))
        step = step[np.lexsort((batching.lengths[step], kinds))]  # by kind, then by length
    groups = batching.groups(len(step))
    if batching.max_tokens is None:
        return np.array_split(step, groups)
    assert batching.lengths is not None
    lengths = batching.lengths[step].tolist()
    check_budget(batching, lengths, groups)
    starts = balanced(lengths, groups, batching.packed)
    return np.split(step, starts[1:])


def balanced(lengths: list[int], groups: int, packed: bool) -> list[int]:
    """Where each of `groups` runs of `lengths` starts, so that the costliest costs as little as can be."""
    low, high = 0, cost(lengths, packed)
    while low < high:
        middle = (low + high) // 2
        starts = runs(lengths, middle, packed)
        low, high = (low, middle) if starts is not None and len(starts) <= groups else (middle + 1, high)
    starts = runs(lengths, low, packed)
    assert starts is not None
    while len(starts) < groups:  # a process without a micro-batch would leave the others waiting
        spans = zip(starts, [*starts[1:], len(lengths)], strict=True)
        low, high = max((s for s in spans if s[1] - s[0] > 1), key=lambda s: cost(lengths[s[0] : s[1]], packed))
        starts = sorted([*starts, (low + high) // 2])
    return starts


def runs(lengths: list[int], budget: int, packed: bool) -> list[int] | None:
    """Where each run starts if each takes as many as the budget lets it; None where one alone is over it."""
    starts, total, longest = [0], 0, 0
    for place, length in enumerate(lengths):
        if length > budget:
            return None
        total, longest = total + length, max(longest, length)
        if (total if packed else longest * (place - starts[-1] + 1)) > budget:
            starts.append(place)
            total = longest = length
    return starts


def cost(lengths: list[int], packed: bool) -> int:
    """Tokens of a micro-batch, padding included."""
    return sum(lengths) if packed else len(lengths) * max(lengths)


def check_budget(batching: Batching, lengths: list[int], groups: int) -> None:
    """Raise UserError unless `max_tokens` holds for a step's samples in so many micro-batches."""
    budget = batching.max_tokens or 0
    starts = runs(lengths, budget, batching.packed)
    if starts is None:
        raise UserError(
            f"data.max_tokens {budget}: one sample alone takes about {max(lengths)} tokens; raise it, or set "
            "data.max_length"
        )
    if len(starts) > groups:
        raise UserError(
            f"data.max_tokens {budget}: the {len(lengths)} samples of a step need {len(starts)} such micro-batches, "
            f"and there are {groups}; raise it, or lower training.micro_batch_size, which makes them more"
        )


def check_budgets(batching: Batching, epochs: int) -> None:
    """Raise UserError unless `max_tokens` holds in all steps of so many epochs: better known before the first."""
    if batching.max_tokens is not None:
        for epoch in range(epochs):
            for step in step_samples(batching, epoch):
                micro_batches_of(batching, step)


class MicroBatches(Sampler[list[int]]):
    """One process's micro-batches of an epoch, as lists of indices: a batch sampler for a DataLoader."""

    def __init__(self, batching: Batching, rank: int = 0):
        self.batching, self.rank, self.epoch = batching, rank, 0

    def __len__(self) -> int:
        batching = self.batching
        last = batching.samples - (batching.steps - 1) * batching.batch_size
        full = batching.groups(batching.batch_size) * (batching.steps - 1)
        return (full + batching.groups(last)) // batching.world

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for step in step_samples(self.batching, self.epoch):
            for group in micro_batches_of(self.batching, step)[self.rank :: self.batching.world]:
                yield group.tolist()


def check_batches(config: RunConfig, micro: int, world: int, dataset: Any) -> None:
    """Raise UserError where `data.max_tokens` cannot be held in some epoch of the run."""
    plan = batching(config, micro, world, dataset)
    epochs = math.ceil(config.training.epochs)
    if config.training.max_steps is not None:
        epochs = math.ceil(config.training.max_steps / plan.steps)
    check_budgets(plan, epochs)


def batching(config: RunConfig, micro: int, world: int, dataset: Any) -> Batching:
    """How the run's batches, of at most `micro` samples a process, are made of the dataset.

    Its `lengths` (about, in tokens) and `kinds` (bits: 1 pictures, 2 videos) are for grouping and budgets alone.
    """
    data = config.data
    described = {}
    if data.group_by is not None or data.max_tokens is not None:
        most = data.max_length or np.iinfo(np.int64).max
        described = {
            "lengths": np.minimum(np.asarray(dataset.lengths, np.int64), most),
            "kinds": np.asarray(dataset.kinds),
        }
    return Batching(
        samples=len(dataset),
        batch_size=config.training.batch_size,
        micro_batch_size=micro,
        world=world,
        seed=config.training.seed,
        group_by=data.group_by,
        max_tokens=data.max_tokens,
        packed=data.packing,
        **described,
    )
