"""Leaderboards' files: what is the same for all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.results import Result
from mmdora.errors import UserError


def unanswered_split(results: Sequence[Result], wanted: str) -> Result:
    """The only result, of a split whose answers are not public. Raises UserError that says what is `wanted`."""
    if len(results) != 1:
        raise UserError(f"{len(results)} results: the leaderboard's file holds one, of {wanted}")
    result = results[0]
    if public := [row["id"] for row in result.rows if row["references"]]:
        what = f"{len(public)} of its questions have public answers, such as {public[0]}"
        raise UserError(f"{result.folder}: {what}; the leaderboard takes {wanted}")
    return result


def write_json(out: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
