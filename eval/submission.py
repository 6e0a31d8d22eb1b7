"""Write results as the file that a benchmark's leaderboard accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.benchmarks import BENCHMARKS
from eval.results import read_result
from mmdora.core.config_files import make_folder
from mmdora.core.errors import UserError


@dataclass(frozen=True)
class Submission:
    benchmark: str
    answers: int


def write_submission(folders: Sequence[Path], out: Path) -> Submission:
    """Write the leaderboard's file for results of one benchmark, one result directory or one per split.

    Raises UserError for results of several benchmarks, for results with a `limit`, and for an existing `out`.
    """
    if out.exists():
        raise UserError(f"--out: {out} already exists; give a new file")
    results = [read_result(folder) for folder in folders]
    names = sorted({result.benchmark for result in results})
    if len(names) > 1:
        raise UserError(f"the results are of several benchmarks ({', '.join(names)}); a submission holds one")
    for result in results:
        if (limit := result.receipt.get("limit")) is not None:
            raise UserError(
                f"{result.folder}: only the first {limit} questions were evaluated; a leaderboard needs all of them"
            )
    benchmark = BENCHMARKS[names[0]]()
    make_folder(out.parent, "--out")
    benchmark.write_submission(results, out)
    return Submission(names[0], sum(len(result.rows) for result in results))
