"""`training.patience`: the end of a run whose evaluations no longer improve `training.best`."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class Patience:
    """Counts the evaluations since the best one. Every process has the same count; checkpoints hold it."""

    def __init__(self, limit: int | None):
        """`limit` is `training.patience`; with None the patience never ends."""
        self.limit = limit
        self.count = 0

    @property
    def ended(self) -> bool:
        return self.limit is not None and self.count >= self.limit

    def add(self, improved: bool, step: int) -> None:
        """Count the evaluation after `step`."""
        self.count = 0 if improved else self.count + 1
        if self.ended:
            log.warning("training ends after step %d: %d evaluations did not improve on the best", step, self.count)
