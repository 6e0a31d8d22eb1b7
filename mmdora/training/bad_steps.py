"""Skip optimizer steps whose loss or gradients would ruin the weights; report their samples, and count them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from mmdora.core.distributed import any_rank
from mmdora.core.errors import RunError

log = logging.getLogger(__name__)

MAX_LOGGED_SAMPLES = 8  # skipped.jsonl lists all of them


class BadSteps(TrainerCallback):
    """Decides from loss and gradients whether an optimizer step is taken; the same in every process.

    Args:
        limit: number of skipped steps after which the run ends with a RunError.
        max_loss: a step whose mean loss per token is higher is skipped.
        record_skipped: called with the dataset indices of this process's samples in a skipped step, and the reason;
            returns their names.
    """

    def __init__(self, limit: int, max_loss: float, record_skipped: Callable[[Sequence[int], str], list[str]]):
        self.limit, self.max_loss, self.record_skipped = limit, max_loss, record_skipped
        self.count = 0
        self.reason: str | None = None  # why the last step was skipped; None if it was taken
        self.loss = math.nan  # of the last step: the mean over all its tokens, in all processes
        self._micro_batches: list[tuple[Tensor, Tensor | None]] = []  # loss and sample indices
        self._total: Tensor | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reason, self._micro_batches, self._total = None, [], None

    def add_micro_batch(self, loss: Tensor, indices: Tensor | None, last: bool) -> None:
        """Add a micro-batch's share of the step's loss and its samples; `last` marks the step's last micro-batch."""
        self._micro_batches.append((loss.detach(), indices))
        if last:
            self._total = torch.stack([loss for loss, _ in self._micro_batches]).sum()
            if torch.distributed.is_initialized():  # asynchronous on a GPU: the value is read after the backward pass
                torch.distributed.all_reduce(self._total)
                self._total /= torch.distributed.get_world_size()

    def should_skip(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether to skip the step. DeepSpeed's optimizers call this once per group of parameters."""
        if self._total is None:
            return False  # the step that DeepSpeed takes itself at stage 0: see `reset_stage_0_optimizer`
        if self.reason is None:
            self.reason = self._bad_loss()
        if self.reason is None and any_rank(has_nonfinite_gradients(parameters)):  # ZeRO: each rank has its own
            self.reason = "the gradients are not finite"
        return self.reason is not None

    def _bad_loss(self) -> str | None:
        assert self._total is not None
        self.loss = self._total.item()
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        if self.loss > self.max_loss:
            return f"the loss of {self.loss:.3g} is over {self.max_loss:.3g}, far worse than guessing"
        return None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bad_loss = self._bad_loss()
        if self.reason is None and getattr(kwargs["optimizer"], "step_was_skipped", False):
            # DeepSpeed or torch skipped the step without asking. In float16 overflowing gradients are how the loss
            # scale is found; the loss itself is not scaled.
            self.reason = bad_loss or (None if args.fp16 else "the gradients are not finite")
        if self.reason is None:
            return
        self.count += 1
        reason = f"step {state.global_step} was skipped: {self.reason}"
        names = self.record_skipped(self._suspect_samples(), reason)
        more = f" and {len(names) - MAX_LOGGED_SAMPLES} more" if len(names) > MAX_LOGGED_SAMPLES else ""
        samples = ", ".join(names[:MAX_LOGGED_SAMPLES]) + more
        log.warning("%s%s", reason, f"; its samples: {samples}" if names else "")
        if self.count >= self.limit:
            raise RunError(
                f"{self.count} steps were skipped (training.max_bad_steps). The last one: {reason}. skipped.jsonl "
                f"lists their samples ({samples or 'other processes had them'}): check them, or lower "
                "training.learning_rate"
            )

    def _suspect_samples(self) -> list[int]:
        """Return this process's samples in the step's bad micro-batches, or in all of them if none can be blamed."""
        bad = [not math.isfinite(loss.item()) for loss, _ in self._micro_batches]
        if not any(bad) and not math.isfinite(self.loss):
            return []  # another process had the bad micro-batch
        suspects = [
            indices for (_, indices), is_bad in zip(self._micro_batches, bad, strict=True) if is_bad or not any(bad)
        ]
        return [int(index) for indices in suspects if indices is not None for index in indices.tolist()]


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves weights and moments unchanged if `guard` skips the step.

    DeepSpeed wraps it as it is, at every stage.
    """

    guard: BadSteps

    def step(self, closure: Any = None) -> Any:
        if self.guard.should_skip([p for group in self.param_groups for p in group["params"]]):
            return None
        return super().step(closure)


def has_nonfinite_gradients(parameters: Sequence[Tensor]) -> bool:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return bool(gradients) and not math.isfinite(torch.nn.utils.get_total_norm(gradients).item())
