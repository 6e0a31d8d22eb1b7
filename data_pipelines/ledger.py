"""The ledger: every sample that was not used, or was changed, with its reason. A run never trains on something else in
silence."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipelines.samples import Rejected, Sample, SampleError
from mmdora.core.errors import UserError

MOST = 500  # characters of a reason or a file's name in the ledger
# Quoted names, paths and numbers. A path begins after a space: were it sought at every character, a long text without
# spaces would take the square of its length.
NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|(?<!\S)\S*/\S*|\d+")


@dataclass(frozen=True)
class Entry:
    """One line of skipped.jsonl. `stage` says where it came up: `parse`, `media`, `encode` or `train`; `file` is the
    one at fault, if one is; `changed`: the sample was used, but not as it was, or not in every step."""

    id: str
    source: str
    stage: str
    reason: str
    file: str | None = None
    changed: bool = False


class Ledger:
    """Appends to one file from any number of processes; a sample counts once, however often it is met.

    Every process learns from the file what the others wrote, and reads each line of it once. `total` is the number of
    samples that the run has.
    """

    def __init__(self, path: Path, total: int, max_skipped: float):
        self.path, self.total, self.max_skipped = path, total, max_skipped
        self.entries: dict[tuple[str, str, bool, bool], Entry] = {}
        self._read = 0  # bytes of the file

    def record(self, *entries: Entry) -> None:
        """Add samples. Raises UserError with the worst offenders once more than `max_skipped` of all are lost."""
        self.refresh()
        new = {_key(entry): _cut(entry) for entry in entries if _key(entry) not in self.entries}
        if new:
            lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in new.values())
            with self.path.open("ab") as file:  # one write: lines stay whole, whichever process writes
                file.write(lines.encode("utf-8", "replace"))
            self.refresh()
        skipped = [entry for entry in self.entries.values() if not entry.changed]
        if len(skipped) > self.max_skipped * self.total:
            raise UserError(
                f"{len(skipped)} of {self.total} samples skipped, more than data.max_skipped {self.max_skipped:.1%} "
                f"allows: {worst(skipped)}. All of them are in {self.path}"
            )

    def summary(self) -> str:
        """What was lost and what was changed, by reason."""
        self.refresh()
        skipped = [entry for entry in self.entries.values() if not entry.changed]
        changed = [entry for entry in self.entries.values() if entry.changed]
        text = f"{len(skipped)} of {self.total} samples skipped"
        text += f": {worst(skipped)}" if skipped else ""
        return text + (f"; {len(changed)} changed: {worst(changed)}" if changed else "")

    def refresh(self) -> None:
        """Learn what other processes wrote since."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]  # another process may be in the middle of a line
        self._read += len(whole)
        for line in whole.decode("utf-8").split("\n")[:-1]:  # splitlines would split at a reason's U+2028 too
            entry = Entry(**json.loads(line))
            self.entries.setdefault(_key(entry), entry)

    def check(self, entries: Sequence[Entry]) -> None:
        """Raise UserError if these entries alone exceed `max_skipped`. Writes nothing."""
        if len(entries) > self.max_skipped * self.total:
            raise UserError(
                f"{len(entries)} of {self.total} samples skipped, more than data.max_skipped {self.max_skipped:.1%} "
                f"allows: {worst(entries)}"
            )


def _key(entry: Entry) -> tuple[str, str, bool, bool]:
    """A sample that was shortened, say, is told again where a step of it was not taken."""
    return entry.source, entry.id, entry.changed, entry.stage == "train"


def _cut(entry: Entry) -> Entry:
    return replace(entry, reason=entry.reason[:MOST], file=entry.file and entry.file[:MOST])


def mend(path: Path) -> None:
    """Drop a last line that a killed process left unfinished; its sample will be met again."""
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n") and content:
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def from_error(error: SampleError) -> Entry:
    reason = error.reason.removeprefix(f"{error.media}: ")
    return Entry(error.sample_id, error.source, error.stage, reason, error.media)


def from_rejected(row: Rejected) -> Entry:
    return Entry(row.id, row.source, "parse", row.reason, row.media)


def from_change(sample: Sample, reason: str) -> Entry:
    return Entry(sample.id, sample.source, "encode", reason, changed=True)


def read_ledger(path: Path) -> list[Entry]:
    """The file's entries, each sample once; an absent file is an empty ledger."""
    ledger = Ledger(path, 0, 1.0)
    ledger.refresh()
    return list(ledger.entries.values())


def by_reason(entries: Iterable[Entry]) -> list[tuple[int, Entry]]:
    """How many entries share each reason, most first, with an example; names and numbers in a reason do not count."""
    counts: Counter[str] = Counter()
    examples: dict[str, Entry] = {}
    for entry in entries:
        kind = NAMES.sub("…", entry.reason)
        counts[kind] += 1
        examples.setdefault(kind, entry)
    return [(count, examples[kind]) for kind, count in counts.most_common()]


def worst(entries: Iterable[Entry], most: int = 3) -> str:
    """The commonest reasons, with a count and an example each."""
    reasons = by_reason(entries)
    listed = [f"{count} × {entry.reason} ({entry.file or entry.id})" for count, entry in reasons[:most]]
    return "; ".join(listed) + (f"; and {len(reasons) - most} other reasons" if len(reasons) > most else "")
