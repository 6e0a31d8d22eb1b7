"""The loss on held-out samples: the mean over all their supervised tokens, however these are split."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from data_pipelines.encoding import IGNORED
from mmdora.adapters.ops.norm_cache import weights_fixed
from mmdora.core.distributed import all_gather_numbers
from mmdora.core.errors import UserError
from mmdora.training.loader_workers import start_worker, unwrapped_worker_errors


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is evaluated: no dropout, no gradients, norms computed once. What comes after does
    not know that there was a block: the model's mode and every random number are as before."""
    was_training = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    model.eval()
    try:
        with torch.no_grad(), weights_fixed():
            yield
    finally:
        for module, mode in was_training.items():
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def batches_of(samples: int, size: int, rank: int, world: int) -> list[list[int]]:
    """A process's batches of samples: every `world`-th, and empty ones, so that each process has as many."""
    batches = [list(range(start, min(start + size, samples))) for start in range(0, samples, size)]
    batches += [[]] * (-len(batches) % world)
    return batches[rank::world]


def validation_loss(
    trainer: Any,
    dataset: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[float, int]:
    """The mean loss of the dataset's supervised tokens, and how many these are. A collective: every process calls it.

    Every sample counts once. Each process runs the model equally often, as ZeRO-3 wants it. Raises UserError
    where no sample can be used.
    """
    args, samples = trainer.args, len(dataset)  # type: ignore[arg-type]
    groups = batches_of(samples, args.per_device_train_batch_size, args.process_index, args.world_size)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=groups,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator(),  # of its own: a loader draws a seed
        pin_memory=args.dataloader_pin_memory,
        worker_init_fn=start_worker,
    )
    total, tokens, at_once = 0.0, 0, args.per_device_train_batch_size * args.world_size
    with unwrapped_worker_errors():
        for done, batch in enumerate(loader):
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss = summed_loss(trainer, batch, count)
            if count:  # else there is no mean to speak of: a batch for the others' sake
                total, tokens = total + loss, tokens + count
            advance(min(at_once, samples - done * at_once))
    total, tokens = all_gather_numbers([total, float(tokens)], args.device).sum(0).tolist()
    if not tokens:
        raise UserError("data.validation: none of its samples can be used; skipped.jsonl says why")
    return total / tokens, int(tokens)


def summed_loss(trainer: Any, batch: dict[str, torch.Tensor], count: int) -> float:
    """The loss of a batch's supervised tokens, of which there are `count`, added up."""
    inputs = trainer._prepare_inputs(batch)
    with trainer.compute_loss_context_manager():
        if trainer.model_accepts_loss_kwargs:
            return float(trainer.model(**inputs, num_items_in_batch=torch.tensor(1, device=trainer.args.device)).loss)
        return float(trainer.model(**inputs).loss) * count
