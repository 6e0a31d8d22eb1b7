"""Leaderboards' files: of one result, and whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval.results import Result
from mmdora.errors import UserError


def only_result(results: Sequence[Result]) -> Result:
    """The result, for leaderboards that take one. Raises UserError for several."""
    if len(results) > 1:
        raise UserError(f"{results[0].benchmark} takes one result, not {len(results)}: {results[1].folder} is another")
    return results[0]


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A file beside `out` to write into; it becomes `out` once it is complete, and is gone if it never is."""
    aside = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        yield aside
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def write_lines(out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines."""
    with written_whole(out) as aside:
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
