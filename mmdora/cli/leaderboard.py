"""`mmdora leaderboard`: results of several models as one page."""

from __future__ import annotations

from pathlib import Path

from eval.leaderboard import arrange
from eval.leaderboard_page import max_media_per_benchmark, write_leaderboard
from eval.results import Result, find_results, read_result, without_garbage_collection
from mmdora.core.config_files import make_folder
from mmdora.core.console import make_console, progress_bar
from mmdora.core.errors import UserError
from mmdora.core.registry import import_plugins


@without_garbage_collection()
def run(results: list[str], html: Path, plugins: list[str]) -> None:
    import_plugins(plugins)
    if html.is_dir():
        raise UserError(f"--html {html}: this is a folder; name the page to write in it")
    named = [pair for argument in results for pair in read_named(argument)]
    board = arrange(named)
    make_folder(html.parent, "--html")
    console = make_console()
    files = [len({path for row in column.first.rows for path in row["media"]}) for column in board.columns]
    shown = sum(min(max_media_per_benchmark(board), count) for count in files)
    with progress_bar(console, "pictures", shown) as advance:
        write_leaderboard(html, board, advance)
    size = html.stat().st_size / 2**20
    counts = f"{len(board.models)} models, {len(board.columns)} benchmarks"
    console.print(f"Wrote {html} ({size:.1f} MiB): {counts}", soft_wrap=True)


def read_named(argument: str) -> list[tuple[str | None, Result]]:
    """The results of `[NAME=]PATH`, each under the name, if there is one. A path that is there is a path."""
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        name, path = "", argument
    return [(name.strip() or None, read_result(folder)) for folder in find_results(Path(path))]
