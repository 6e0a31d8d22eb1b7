"""`mmdora submit`: results as the file that their benchmark's leaderboard takes."""

from __future__ import annotations

from pathlib import Path

from eval.benchmarks import BENCHMARKS
from eval.results import read_result
from mmdora.core.config_files import make_folder
from mmdora.core.console import make_console
from mmdora.core.errors import UserError
from mmdora.core.registry import import_plugins


def run(folders: list[Path], out: Path, plugins: list[str]) -> None:
    import_plugins(plugins)
    results = [read_result(folder) for folder in folders]
    names = sorted({result.benchmark for result in results})
    if len(names) > 1:
        raise UserError(f"results of several benchmarks ({', '.join(names)}) do not go into one file")
    for result in results:
        if (limit := result.receipt.get("limit")) is not None:
            raise UserError(f"{result.folder}: only the first {limit} questions were asked; a leaderboard wants all")
    if out.exists():
        raise UserError(f"{out} is there already; --out names a new file")
    make_folder(out.parent, "--out")
    BENCHMARKS[names[0]]().write_submission(results, out)
    make_console().print(f"Wrote {out}, {sum(len(r.rows) for r in results):,} answers to {names[0]}", soft_wrap=True)
