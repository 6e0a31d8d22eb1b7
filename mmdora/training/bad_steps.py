"""Steps that would ruin the weights: not taken, told with their samples, and counted."""

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

LISTED = 8  # samples in the log; all of them are in skipped.jsonl


class BadSteps(TrainerCallback):
    """Judges each optimizer step by its loss and its gradients, alike in every process.

    `worst_loss` is the mean loss of a token over which a step counts as exploded. `tell` is given the dataset's indices
    of the samples that this process had in a bad step, and why. Raises RunError after `limit` such steps.
    """

    def __init__(self, limit: int, worst_loss: float, tell: Callable[[Sequence[int], str], list[str]]):
        self.limit, self.worst_loss, self.tell = limit, worst_loss, tell
        self.count = 0
        self.reason: str | None = None  # why the last step was not taken, if it was not
        self.loss = math.nan  # of the last step: the mean over all its tokens, of all processes
        self._seen: list[tuple[Tensor, Tensor | None]] = []
        self._total: Tensor | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reason, self._seen, self._total = None, [], None

    def saw(self, loss: Tensor, indices: Tensor | None, last: bool) -> None:
        """A micro-batch's share of the step's loss, and which samples it held; `last` of the step."""
        self._seen.append((loss.detach(), indices))
        if last:
            self._total = torch.stack([loss for loss, _ in self._seen]).sum()
            if torch.distributed.is_initialized():  # enqueued, and not waited for before the gradients are there
                torch.distributed.all_reduce(self._total)
                self._total /= torch.distributed.get_world_size()

    def refuses(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the step is not to be taken. DeepSpeed asks once for each group of parameters."""
        if self._total is None:
            return False  # DeepSpeed's own, at stage 0: see `begin_stage_0`
        if self.reason is None:
            self.reason = self._trouble()
        if self.reason is None and any_rank(trouble_of_gradients(parameters)):  # under ZeRO each sees its own
            self.reason = "its gradients are not finite"
        return self.reason is not None

    def _trouble(self) -> str | None:
        assert self._total is not None
        self.loss = self._total.item()
        if not math.isfinite(self.loss):
            return f"its loss is {self.loss}"
        if self.loss > self.worst_loss:
            return f"its loss of {self.loss:.3g} is over {self.worst_loss:.3g}, far worse than a guess"
        return None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trouble = self._trouble()
        engine = kwargs["optimizer"]
        if self.reason is None and getattr(engine, "step_was_skipped", False):
            # Nobody was asked: the gradients were seen before. In float16 that is how the loss's scale is found; the
            # loss itself is not scaled.
            self.reason = trouble or (None if args.fp16 else "its gradients are not finite")
        if self.reason is None:
            return
        self.count += 1
        bad = [not math.isfinite(loss.item()) for loss, _ in self._seen]
        elsewhere = not any(bad) and not math.isfinite(self.loss)  # another process had it
        chosen = [i for (_, i), is_bad in zip(self._seen, bad, strict=True) if is_bad or not any(bad)]
        indices = [] if elsewhere else [int(k) for found in chosen if found is not None for k in found.tolist()]
        reason = f"step {state.global_step} was not taken: {self.reason}"
        names = self.tell(indices, reason)
        listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        log.warning("%s%s", reason, f"; its samples: {listed}" if names else "")
        if self.count >= self.limit:
            raise RunError(
                f"{self.count} steps would have ruined the model (training.max_bad_steps); the last: {reason}. "
                f"Their samples are in skipped.jsonl. {listed or 'Other processes had them'}: look at these, or lower "
                "training.learning_rate"
            )


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves weights and moments as they are where `guard` refuses the step. DeepSpeed takes it as its own
    optimizer, at every stage."""

    guard: BadSteps

    def step(self, closure: Any = None) -> Any:
        if self.guard.refuses([p for group in self.param_groups for p in group["params"]]):
            return None
        return super().step(closure)


def trouble_of_gradients(parameters: Sequence[Tensor]) -> bool:
    """Whether some gradient is not finite."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return bool(gradients) and not math.isfinite(torch.nn.utils.get_total_norm(gradients).item())
