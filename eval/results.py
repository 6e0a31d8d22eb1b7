"""A result directory: `report.json` with the figures, `scores.jsonl` with one line a question."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdora.errors import UserError


@dataclass(frozen=True)
class Result:
    """One benchmark's answers and scores by one model, as `mmdora eval` or `mmdora score` wrote them."""

    folder: Path
    report: dict[str, Any]
    rows: list[dict[str, Any]]  # id, question, media, references, response, cluster, categories, details, scores

    @property
    def benchmark(self) -> str:
        return str(self.report["benchmark"])

    @property
    def receipt(self) -> dict[str, Any]:
        return dict(self.report["receipt"])


def read_result(folder: Path) -> Result:
    """Raises UserError where `folder` holds no finished result, or one that was changed by hand."""
    if not (folder / "report.json").is_file():
        raise UserError(f"{folder}: no report.json; a result is a folder such as <run>/eval/<name>")
    result = Result(folder, read_report(folder), read_scores(folder))
    if result.report.get("n") != len(result.rows):
        asked = result.report.get("n")
        raise UserError(f"{folder}: report.json is of {asked} questions, scores.jsonl has {len(result.rows)}")
    return result


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def read_scores(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "scores.jsonl").read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 too
    return [json.loads(line) for line in lines if line]
