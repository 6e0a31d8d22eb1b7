"""The audit of the first steps: a trainable parameter that does not move is wired to nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from mmdora.core.deepspeed import is_at_hand, local_shard
from mmdora.core.distributed import any_rank_each
from mmdora.core.errors import RunError

AUDITED_STEPS = 3  # B starts at zero, so A gets its first gradient a step after B's
PROBES = 8  # parameters of a part that are looked at until one of them has moved


class Audit:
    """Watches trainable parameters by part. A part's steps count from the first that moved it: a vision encoder learns
    nothing from samples without a picture, and a warm-up may begin at rate 0."""

    def __init__(self, model: nn.Module, parts: Mapping[int, str], device: torch.device):
        """`parts` names the part of each parameter that is to move, by its `id`."""
        self.model, self.device = model, device
        self.starts: dict[str, dict[str, Tensor]] = {}
        self.since: dict[str, int] = {}
        self.last = -1
        for name, parameter in model.named_parameters():
            if id(parameter) in parts and is_at_hand(parameter):
                self.starts.setdefault(parts[id(parameter)], {})[name] = local_shard(parameter).clone()

    def check(self, step: int) -> None:
        """To be called by every process after each optimizer step. Raises RunError that names what did not move."""
        if step == self.last:
            return
        self.last = step
        for part in list(self.starts):
            names = list(self.starts[part])
            if part not in self.since:
                if self._moved(part, names[:: max(1, len(names) // PROBES)]):
                    self.since[part] = step
            elif step >= self.since[part] + AUDITED_STEPS - 1:
                moved = self._moved(part, names)
                del self.starts[part]
                if still := [name for name in names if name not in moved]:
                    listed = ", ".join(still[:8]) + (f" and {len(still) - 8} more" if len(still) > 8 else "")
                    raise RunError(
                        f"{len(still)} trainable parameters of parts.{part} did not move in {AUDITED_STEPS} steps that "
                        f"moved others of it: {listed}. The model does not use them: leave them out with "
                        f"parts.{part}.targets"
                    )

    @property
    def idle(self) -> list[str]:
        """Parts of which nothing has moved yet."""
        return [part for part in self.starts if part not in self.since]

    def _moved(self, part: str, names: Collection[str]) -> set[str]:
        """Those of the parameters that differ from their start, in any process."""
        parameters, starts = dict(self.model.named_parameters()), self.starts[part]
        moved = [not torch.equal(local_shard(parameters[name]), starts[name]) for name in names]
        # Under ZeRO-3 a rank's share of a small tensor may be padding alone.
        return {name for name, yes in zip(names, any_rank_each(moved, self.device), strict=True) if yes}
