"""`mmdora leaderboard`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdora.cli.app import Plugins, app

if TYPE_CHECKING:
    from eval.results import Result


@app.command()
def leaderboard(
    results: Annotated[
        list[str], typer.Argument(metavar="[NAME=]RESULT...", help="Results, runs, or folders of results.")
    ],
    html: Annotated[Path, typer.Option(help="HTML file to write.")],
    plugin: Plugins = None,
) -> None:
    """Write an HTML page that ranks models, down to each question."""
    from eval.results import without_garbage_collection
    from mmdora.core.config_files import make_folder
    from mmdora.core.errors import UserError
    from mmdora.core.registry import import_plugins

    import_plugins(plugin or [])
    if html.is_dir():
        raise UserError(f"--html {html}: this is a folder; give the file to write")
    with without_garbage_collection():
        named = [pair for argument in results for pair in _read_named(argument)]

        from eval.leaderboard import arrange
        from eval.leaderboard_page import max_media_per_benchmark, write_leaderboard
        from mmdora.core.console import make_console, progress_bar

        board = arrange(named)
        make_folder(html.parent, "--html")
        console = make_console()
        files = [len({path for row in column.first.rows for path in row["media"]}) for column in board.columns]
        images = sum(min(max_media_per_benchmark(board), count) for count in files)
        with progress_bar(console, "images", images) as advance:
            write_leaderboard(html, board, advance)
    size = html.stat().st_size / 2**20
    counts = f"{len(board.models)} models, {len(board.columns)} benchmarks"
    console.print(f"Wrote {html} ({size:.1f} MiB): {counts}", soft_wrap=True)


def _read_named(argument: str) -> list[tuple[str | None, Result]]:
    """Read the results of `[NAME=]PATH`, each with its name. An argument that exists as a path has no name."""
    from eval.results import find_results, read_result

    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        name, path = "", argument
    return [(name.strip() or None, read_result(folder)) for folder in find_results(Path(path))]
