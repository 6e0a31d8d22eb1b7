"""The ledger: every sample that was not used, with its reason. A run never trains on something else in silence."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipelines.samples import Rejected, SampleError
from mmdora.errors import UserError


@dataclass(frozen=True)
class Skipped:
    """One line of skipped.jsonl. `stage` says where it came up: `parse`, `media` or `encode`."""

    id: str
    source: str
    stage: str
    reason: str
    media: str | None = None


class Ledger:
    """Appends to one file from any number of processes; a sample counts once, however often it is met."""

    def __init__(self, path: Path, total: int, max_skipped: float):
        self.path, self.total, self.max_skipped = path, total, max_skipped
        self._known: set[tuple[str, str]] = set()

    def record(self, skipped: Skipped) -> None:
        """Add a sample. Raises UserError with the worst offenders once more than `max_skipped` of all are lost."""
        key = (skipped.source, skipped.id)
        if key in self._known:
            return
        self._known.add(key)
        with self.path.open("a", encoding="utf-8") as file:  # one write of one line: whole, whichever process writes
            file.write(json.dumps(asdict(skipped), ensure_ascii=False) + "\n")
        entries = read_ledger(self.path)
        if len(entries) > self.max_skipped * self.total:
            raise UserError(
                f"{self.summary()}, more than data.max_skipped {self.max_skipped:.1%} allows: {worst(entries)}. "
                f"All of them are in {self.path}"
            )

    def summary(self) -> str:
        return f"{len(read_ledger(self.path))} of {self.total} samples skipped"


def from_error(error: SampleError) -> Skipped:
    return Skipped(error.sample_id, error.source, error.stage, error.reason, error.media)


def from_rejected(row: Rejected) -> Skipped:
    return Skipped(row.id, row.source, "parse", row.reason, row.media)


def read_ledger(path: Path) -> list[Skipped]:
    """The file's entries, each sample once; an absent file is an empty ledger."""
    if not path.exists():
        return []
    lines = [Skipped(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({(entry.source, entry.id): entry for entry in lines}.values())


def worst(entries: list[Skipped], most: int = 3) -> str:
    """The commonest reasons with a count and an example each."""
    stages = Counter(entry.stage for entry in entries)
    examples = [
        f"{count} at stage {stage!r}, such as {next(e for e in entries if e.stage == stage).reason}"
        for stage, count in stages.most_common(most)
    ]
    return "; ".join(examples)
