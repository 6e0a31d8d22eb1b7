"""Batching: which samples form each step's micro-batches, for all processes, computed from sizes and a seed.

A step always takes the next `batch_size` samples of the epoch's order, in the same number of micro-batches. Grouping
and token budgets only decide which of these samples share a micro-batch. So the gradient, which weights every token
equally, does not change. The same seed and epoch give the same batches for any number of data loading workers.
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
class BatchSpec:
    """How `samples` are split into batches. `lengths` are in tokens (estimates suffice); `kinds` are bits (1: images,
    2: videos)."""

    samples: int
    batch_size: int  # samples per step, over all processes
    micro_batch_size: int  # samples of a process at once; the mean, with a token budget
    world_size: int = 1
    seed: int = 0
    group_by: Literal["length", "modality"] | None = None
    max_tokens: int | None = None  # upper limit per micro-batch
    packed: bool = False  # samples are concatenated into rows instead of padded
    lengths: Ints | None = None
    kinds: Ints | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.batch_size)

    def num_micro_batches(self, samples: int) -> int:
        """Return the number of micro-batches of a step, over all processes; each process gets the same number."""
        return -(-samples // (self.micro_batch_size * self.world_size)) * self.world_size


def epoch_order(samples: int, seed: int, epoch: int) -> Ints:
    """Return the random order of an epoch, which equals that of accelerate's seedable sampler."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(samples, generator=generator).numpy()


def step_samples(spec: BatchSpec, epoch: int) -> Iterator[Ints]:
    """Yield the samples of each step.

    The last step takes the remaining samples. If these are too few for every process to get the same number of
    micro-batches, it repeats the first samples of the epoch.
    """
    order = epoch_order(spec.samples, spec.seed, epoch)
    for start in range(0, spec.samples, spec.batch_size):
        step = order[start : start + spec.batch_size]
        if (missing := spec.num_micro_batches(len(step)) - len(step)) > 0:
            step = np.concatenate([step, np.resize(order, missing)])
        yield step


def split_step(spec: BatchSpec, step: Ints) -> list[Ints]:
    """Split a step's samples into micro-batches. Rank r takes every `world_size`-th one, starting with the r-th.

    Raises:
        UserError: they cannot be split within `max_tokens`.
    """
    if spec.group_by is not None:
        assert spec.lengths is not None
        assert spec.kinds is not None
        kinds = spec.kinds[step] if spec.group_by == "modality" else np.zeros(len(step))
        step = step[np.lexsort((spec.lengths[step], kinds))]  # by kind, then by length
    count = spec.num_micro_batches(len(step))
    if spec.max_tokens is None:
        return np.array_split(step, count)
    assert spec.lengths is not None
    lengths = spec.lengths[step].tolist()
    check_budget(spec, lengths, count)
    return np.split(step, split_evenly(lengths, count, spec.packed)[1:])


def split_evenly(lengths: list[int], count: int, packed: bool) -> list[int]:
    """Return the starts of `count` consecutive groups whose largest token count is as small as possible."""
    low, high = 0, num_tokens(lengths, packed)
    while low < high:
        middle = (low + high) // 2
        starts = split_greedily(lengths, middle, packed)
        low, high = (low, middle) if starts is not None and len(starts) <= count else (middle + 1, high)
    starts = split_greedily(lengths, low, packed)
    assert starts is not None
    while len(starts) < count:  # a process without a micro-batch would keep the others waiting
        spans = zip(starts, [*starts[1:], len(lengths)], strict=True)
        low, high = max((s for s in spans if s[1] - s[0] > 1), key=lambda s: num_tokens(lengths[s[0] : s[1]], packed))
        starts = sorted([*starts, (low + high) // 2])
    return starts


def split_greedily(lengths: list[int], budget: int, packed: bool) -> list[int] | None:
    """Return the starts of consecutive groups that each take as many samples as fit the token budget.

    Returns None if a single sample exceeds the budget.
    """
    starts, total, longest = [0], 0, 0
    for place, length in enumerate(lengths):
        if length > budget:
            return None
        total, longest = total + length, max(longest, length)
        if (total if packed else longest * (place - starts[-1] + 1)) > budget:
            starts.append(place)
            total = longest = length
    return starts


def num_tokens(lengths: list[int], packed: bool) -> int:
    """Return the number of tokens of a micro-batch, padding included."""
    return sum(lengths) if packed else len(lengths) * max(lengths)


def check_budget(spec: BatchSpec, lengths: list[int], count: int) -> None:
    """Raise UserError unless a step's samples fit into `count` micro-batches of `max_tokens`."""
    budget = spec.max_tokens or 0
    starts = split_greedily(lengths, budget, spec.packed)
    if starts is None:
        raise UserError(
            f"data.max_tokens {budget}: a single sample has about {max(lengths)} tokens; raise max_tokens, or set "
            "data.max_length"
        )
    if len(starts) > count:
        raise UserError(
            f"data.max_tokens {budget}: the {len(lengths)} samples of a step need {len(starts)} micro-batches, but a "
            f"step has {count}; raise max_tokens, or lower training.micro_batch_size to get more micro-batches"
        )


def check_budgets(spec: BatchSpec, epochs: int) -> None:
    """Raise UserError unless every step of all epochs fits `max_tokens`, so that no run fails in a late step."""
    if spec.max_tokens is not None:
        for epoch in range(epochs):
            for step in step_samples(spec, epoch):
                split_step(spec, step)


class MicroBatches(Sampler[list[int]]):
    """A batch sampler for a DataLoader: one process's micro-batches of an epoch, as lists of indices."""

    def __init__(self, spec: BatchSpec, rank: int = 0):
        self.spec, self.rank, self.epoch = spec, rank, 0

    def __len__(self) -> int:
        spec = self.spec
        last = spec.samples - (spec.steps_per_epoch - 1) * spec.batch_size
        full = spec.num_micro_batches(spec.batch_size) * (spec.steps_per_epoch - 1)
        return (full + spec.num_micro_batches(last)) // spec.world_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for step in step_samples(self.spec, self.epoch):
            for micro_batch in split_step(self.spec, step)[self.rank :: self.spec.world_size]:
                yield micro_batch.tolist()


def check_batches(config: RunConfig, micro_batch_size: int, world_size: int, dataset: Any) -> None:
    """Raise UserError if some step of the run exceeds `data.max_tokens`."""
    spec = batch_spec(config, micro_batch_size, world_size, dataset)
    epochs = math.ceil(config.training.epochs)
    if config.training.max_steps is not None:
        epochs = math.ceil(config.training.max_steps / spec.steps_per_epoch)
    check_budgets(spec, epochs)


def check_media(config: RunConfig, dataset: Any) -> None:
    """Raise UserError if the vision encoder or projector is trained, but no sample has an image or a video.

    One process would leave the part as it is, and DDP would stop with an error about unused parameters.
    """
    trained = [name for name, part in config.parts.items() if part.method != "frozen"]
    unused = [name for name in trained if name in ("vision", "projector")]
    if unused and not dataset.media_kinds():
        raise UserError(
            f"parts.{unused[0]}: no sample of data.train has an image or a video, so this part would not be trained; "
            "remove it from parts, or add samples with images or videos"
        )


def batch_spec(config: RunConfig, micro_batch_size: int, world_size: int, dataset: Any) -> BatchSpec:
    """Return how the run's batches are formed from the dataset, with up to `micro_batch_size` samples per process.

    The dataset's `lengths` (estimates in tokens) and `kinds` (bits: 1 images, 2 videos) are read only for grouping and
    token budgets.
    """
    data = config.data
    estimates = {}
    if data.group_by is not None or data.max_tokens is not None:
        limit = data.max_length or np.iinfo(np.int64).max
        estimates = {
            "lengths": np.minimum(np.asarray(dataset.lengths, np.int64), limit),
            "kinds": np.asarray(dataset.kinds),
        }
    return BatchSpec(
        samples=len(dataset),
        batch_size=config.training.batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        seed=config.training.seed,
        group_by=data.group_by,
        max_tokens=data.max_tokens,
        packed=data.packing,
        **estimates,
    )
