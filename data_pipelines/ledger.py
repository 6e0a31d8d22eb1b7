"""The ledger: `skipped.jsonl` lists every sample that was skipped or changed, with the reason."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipelines.samples import Rejected, Sample, SampleError
from mmdora.core.errors import UserError

MAX_CHARACTERS = 500  # of a reason or a file name in the ledger
# Quoted names, paths and numbers. A path must follow white space: a search at every character would take quadratic
# time in a long text without spaces.
NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|(?<!\S)\S*/\S*|\d+")


@dataclass(frozen=True)
class Entry:
    """One line of skipped.jsonl.

    `stage` is where the problem was found: `parse`, `media`, `encode` or `train`. `file` is the media file at fault, if
    there is one. `changed` means that the sample was used, but shortened, or left out of some steps.
    """

    id: str
    source: str
    stage: str
    reason: str
    file: str | None = None
    changed: bool = False


class Ledger:
    """Appends entries to one file from any number of processes; each sample counts once, however often it is recorded.

    Every process reads what the others wrote, each line once. `total` is the number of samples of the run.
    """

    def __init__(self, path: Path, total: int, max_skipped: float):
        self.path, self.total, self.max_skipped = path, total, max_skipped
        self.entries: dict[tuple[str, str, bool, bool], Entry] = {}
        self._read = 0  # bytes of the file

    def record(self, *entries: Entry) -> None:
        """Append entries. Raises UserError with the most common reasons once more than `max_skipped` of all samples are
        skipped."""
        self.refresh()
        new = {_key(entry): _shortened(entry) for entry in entries if _key(entry) not in self.entries}
        if new:
            lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in new.values())
            with self.path.open("ab") as file:  # one write keeps lines whole when several processes append
                file.write(lines.encode("utf-8", "replace"))
            self.refresh()
        skipped = [entry for entry in self.entries.values() if not entry.changed]
        if len(skipped) > self.max_skipped * self.total:
            raise UserError(
                f"{len(skipped)} of {self.total} samples skipped, more than data.max_skipped {self.max_skipped:.1%} "
                f"allows: {most_common_reasons(skipped)}. {self.path} lists all of them"
            )

    def summary(self) -> str:
        """Return how many samples were skipped and changed, with the most common reasons."""
        self.refresh()
        skipped = [entry for entry in self.entries.values() if not entry.changed]
        changed = [entry for entry in self.entries.values() if entry.changed]
        text = f"{len(skipped)} of {self.total} samples skipped"
        text += f": {most_common_reasons(skipped)}" if skipped else ""
        return text + (f"; {len(changed)} changed: {most_common_reasons(changed)}" if changed else "")

    def refresh(self) -> None:
        """Read the entries that other processes appended since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            appended = file.read()
        complete = appended[: appended.rfind(b"\n") + 1]  # another process may be in the middle of a line
        self._read += len(complete)
        for line in complete.decode("utf-8").split("\n")[:-1]:  # splitlines would split at U+2028 in a reason too
            entry = Entry(**json.loads(line))
            self.entries.setdefault(_key(entry), entry)

    def check(self, entries: Sequence[Entry]) -> None:
        """Raise UserError if these entries alone exceed `max_skipped`. Writes nothing."""
        if len(entries) > self.max_skipped * self.total:
            raise UserError(
                f"{len(entries)} of {self.total} samples skipped, more than data.max_skipped {self.max_skipped:.1%} "
                f"allows: {most_common_reasons(entries)}"
            )


def _key(entry: Entry) -> tuple[str, str, bool, bool]:
    """The identity of an entry. A sample that was shortened is listed again if one of its steps is skipped."""
    return entry.source, entry.id, entry.changed, entry.stage == "train"


def _shortened(entry: Entry) -> Entry:
    return replace(entry, reason=entry.reason[:MAX_CHARACTERS], file=entry.file and entry.file[:MAX_CHARACTERS])


def drop_incomplete_line(path: Path) -> None:
    """Remove a last line that a killed process did not finish; its sample will be recorded again."""
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n") and content:
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def from_error(error: SampleError) -> Entry:
    """Return the entry of a sample that raised an error."""
    reason = error.reason.removeprefix(f"{error.media}: ")
    return Entry(error.sample_id, error.source, error.stage, reason, error.media)


def from_rejected(row: Rejected) -> Entry:
    """Return the entry of a row that is not a valid sample."""
    return Entry(row.id, row.source, "parse", row.reason, row.media)


def from_change(sample: Sample, reason: str) -> Entry:
    """Return the entry of a sample that was used, but changed."""
    return Entry(sample.id, sample.source, "encode", reason, changed=True)


def by_reason(entries: Iterable[Entry]) -> list[tuple[int, Entry]]:
    """Count the entries of each reason, most common first, with an example. Reasons that differ only in names and
    numbers count as equal."""
    counts: Counter[str] = Counter()
    examples: dict[str, Entry] = {}
    for entry in entries:
        kind = NAMES.sub("…", entry.reason)
        counts[kind] += 1
        examples.setdefault(kind, entry)
    return [(count, examples[kind]) for kind, count in counts.most_common()]


def most_common_reasons(entries: Iterable[Entry], limit: int = 3) -> str:
    """Return the most common reasons as one line, each with its count and an example."""
    reasons = by_reason(entries)
    listed = [f"{count} × {entry.reason} ({entry.file or entry.id})" for count, entry in reasons[:limit]]
    return "; ".join(listed) + (f"; and {len(reasons) - limit} other reasons" if len(reasons) > limit else "")
