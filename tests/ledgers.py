"""Read the ledger that a test wrote."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.ledger import Entry, Ledger


def read_ledger(path: Path) -> list[Entry]:
    """Return the entries of a file, each sample once."""
    ledger = Ledger(path, 0, 1.0)
    ledger.refresh()
    return list(ledger.entries.values())
