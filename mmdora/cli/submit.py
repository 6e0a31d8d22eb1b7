"""`mmdora submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdora.cli.app import Plugins, app


@app.command()
def submit(
    results: Annotated[list[Path], typer.Argument(help="Result directories: one, or one per split.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    plugin: Plugins = None,
) -> None:
    """Write the file that a benchmark's leaderboard accepts."""
    from eval.submission import write_submission
    from mmdora.core.registry import import_plugins

    import_plugins(plugin or [])
    submission = write_submission(results, out)
    typer.echo(f"Wrote {out}, {submission.answers:,} answers to {submission.benchmark}")
