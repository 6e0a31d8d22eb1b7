"""Audit of the first steps: a trainable parameter that does not change is not used by the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from mmdora.core.deepspeed import is_in_memory, local_shard
from mmdora.core.distributed import any_rank_each
from mmdora.core.errors import RunError

AUDITED_STEPS = 3  # B starts at zero, so A gets its first gradient one step after B
PROBES = 8  # parameters per part that are compared until one of them has changed


class Audit:
    """Compares trainable parameters with their initial values, part by part.

    A part's steps count from the first step that changed it: a vision encoder gets no gradient from samples without
    images, and a warm-up may begin at learning rate 0.
    """

    def __init__(self, model: nn.Module, parts: Mapping[int, str], device: torch.device):
        """`parts` maps the `id` of each parameter that must change to its part."""
        self.model, self.device = model, device
        self.initial: dict[str, dict[str, Tensor]] = {}
        self.first_change: dict[str, int] = {}
        self.last_step = -1
        for name, parameter in model.named_parameters():
            if id(parameter) in parts and is_in_memory(parameter):
                self.initial.setdefault(parts[id(parameter)], {})[name] = local_shard(parameter).clone()

    def check(self, step: int) -> None:
        """Compare parameters after an optimizer step. Every process calls it.

        Raises:
            RunError: some parameters of a part did not change although others did.
        """
        if step == self.last_step:
            return
        self.last_step = step
        for part in list(self.initial):
            names = list(self.initial[part])
            if part not in self.first_change:
                if self._changed(part, names[:: max(1, len(names) // PROBES)]):
                    self.first_change[part] = step
            elif step >= self.first_change[part] + AUDITED_STEPS - 1:
                changed = self._changed(part, names)
                del self.initial[part]
                if unchanged := [name for name in names if name not in changed]:
                    more = f" and {len(unchanged) - 8} more" if len(unchanged) > 8 else ""
                    raise RunError(
                        f"{len(unchanged)} trainable parameters of parts.{part} did not change in {AUDITED_STEPS} "
                        f"steps that changed others: {', '.join(unchanged[:8])}{more}. The model does not use them; "
                        f"exclude them with parts.{part}.targets"
                    )

    @property
    def unchanged_parts(self) -> list[str]:
        """Parts of which no parameter has changed yet."""
        return [part for part in self.initial if part not in self.first_change]

    def _changed(self, part: str, names: Collection[str]) -> set[str]:
        """Return the names of the parameters that differ from their initial value in any process."""
        parameters, initial = dict(self.model.named_parameters()), self.initial[part]
        differs = [not torch.equal(local_shard(parameters[name]), initial[name]) for name in names]
        # Under ZeRO-3 a rank's share of a small tensor may consist of padding only.
        flags = any_rank_each(differs, self.device)
        return {name for name, changed in zip(names, flags, strict=True) if changed}
