"""The loss on held-out samples: the mean over all their supervised tokens, independent of batching."""

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
from mmdora.core.distributed import all_gather_numbers, rank, world_size
from mmdora.core.errors import UserError
from mmdora.training.loader_workers import start_worker, unwrapped_worker_errors


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate the model inside the block: no dropout, no gradients, norms computed once.

    After the block the modes of all modules and the random states are as before, so training is not affected.
    """
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


def rank_batches(samples: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return the sample indices of this rank's batches; empty batches give every rank the same number."""
    batches = [list(range(start, min(start + batch_size, samples))) for start in range(0, samples, batch_size)]
    batches += [[]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def validation_loss(
    trainer: Any,
    dataset: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[float, int]:
    """Return the mean loss over the dataset's supervised tokens, and their number.

    A collective: every process calls it. Every sample counts once, and each process calls the model equally often,
    which ZeRO-3 requires.

    Raises:
        UserError: no sample can be used.
    """
    args, samples = trainer.args, len(dataset)  # type: ignore[arg-type]
    batches = rank_batches(samples, args.per_device_train_batch_size, rank(), world_size())
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator(),  # a loader draws a seed, which must not come from the global generator
        pin_memory=args.dataloader_pin_memory,
        worker_init_fn=start_worker,
    )
    total, tokens, global_batch = 0.0, 0, args.per_device_train_batch_size * world_size()
    with unwrapped_worker_errors():
        for done, batch in enumerate(loader):
            supervised = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss = summed_loss(trainer, batch, supervised)
            if supervised:  # an empty batch keeps the processes in step; its mean loss is not a number
                total, tokens = total + loss, tokens + supervised
            advance(min(global_batch, samples - done * global_batch))
    total, tokens = all_gather_numbers([total, float(tokens)], args.device).sum(0).tolist()
    if not tokens:
        raise UserError("data.validation: no sample can be used; see skipped.jsonl for the reasons")
    return total / tokens, int(tokens)


def summed_loss(trainer: Any, batch: dict[str, torch.Tensor], supervised: int) -> float:
    """Return the sum of the losses of a batch's supervised tokens, whose number is given."""
    inputs = trainer._prepare_inputs(batch)
    with trainer.compute_loss_context_manager(), trainer.chunked_loss:
        if trainer.model_accepts_loss_kwargs:
            return float(trainer.model(**inputs, num_items_in_batch=torch.tensor(1, device=trainer.args.device)).loss)
        return float(trainer.model(**inputs).loss) * supervised
