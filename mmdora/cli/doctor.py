"""`mmdora doctor`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from mmdora.cli.app import Config, Overrides, app

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mmdora.apps.doctor import HeldOut, Problem, SourceDiagnosis

COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}


@app.command()
def doctor(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each source to encode.")] = 200,
    html: Annotated[Path | None, typer.Option(help="Write the report to this HTML file too.")] = None,
) -> None:
    """Check a config's data before training.

    Shows an encoded sample of each source, counts, overlaps with held-out data, and problems by severity. Exits with 1
    if there is an error.
    """
    from mmdora.core.config_files import load_config
    from mmdora.core.registry import import_plugins

    settings = load_config(config, overrides)

    from mmdora.apps.check_config import check_config

    import_plugins(settings.plugins)
    check_config(settings)

    from mmdora.apps.doctor import examine
    from mmdora.core.console import make_console, progress_bar
    from mmdora.core.logs import quiet_libraries

    quiet_libraries()
    console = make_console()
    console.record = html is not None
    diagnosis = examine(settings, samples, partial(progress_bar, console))
    for source in diagnosis.sources:
        _show_example(console, source)
    _show_sources(console, diagnosis.sources)
    if diagnosis.held_out:
        _show_overlaps(console, diagnosis.held_out)
    _show_problems(console, diagnosis.problems)
    if html is not None:
        console.save_html(str(html))
    raise typer.Exit(int(diagnosis.has_errors))


def _show_example(console: Console, source: SourceDiagnosis) -> None:
    """Print one conversation as the model reads it, with the supervised tokens in green."""
    from rich.text import Text

    if (example := source.example) is None:
        return
    text = Text()
    for piece, supervised in example.pieces:
        text.append(piece, style="bold green" if supervised else "dim" if piece.startswith("[") else "")
    console.rule(Text(f"{source.name}: sample {example.sample_id}"), align="left")
    console.print(text, soft_wrap=True)
    console.print(f"{example.tokens} tokens, of which {example.supervised} (green) are supervised", style="dim")


def _show_sources(console: Console, sources: Sequence[SourceDiagnosis]) -> None:
    from rich.text import Text

    from data_pipelines.ledger import by_reason
    from mmdora.core.console import make_table

    columns = ("source", "encoded", "images", "videos", "frames", "tokens", "supervised")
    table = make_table("encoded samples (frames and tokens: median, maximum)", *columns)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # file names may be long
    for source in sources:
        inspected, share = source.inspected, source.supervised_share
        images, videos = (str(sum(kind[i] for kind in inspected.media)) for i in (0, 1))
        counts = (inspected.frames, inspected.lengths)
        frames, tokens = (f"{median(values):.0f}, ≤ {max(values)}" if values else "–" for values in counts)
        encoded, supervised = f"{inspected.inspected} of {source.samples:,}", "–" if share is None else f"{share:.1%}"
        table.add_row(source.name, encoded, images, videos, frames, tokens, supervised)
    console.print(table)
    for source in sources:
        inspected = source.inspected
        for total, entries in (
            (f"{source.rows} rows", source.rejected),
            (f"{inspected.inspected} encoded samples", inspected.entries),
        ):
            for count, entry in by_reason(entries):
                change = "changed" if entry.changed else "skipped"
                where = f"{entry.file or entry.id}, at stage {entry.stage!r}"
                text = f"{source.name}: {count} of {total} {change}: {entry.reason} ({where})"
                console.print(Text(text), soft_wrap=True)


def _show_overlaps(console: Console, held_out: Sequence[HeldOut]) -> None:
    from mmdora.core.console import make_table

    columns = ("held out", "files", "identical", "similar", "questions", "same text only")
    table = make_table("held-out data that is in the training data", *columns)
    for entry in held_out:
        overlap = entry.overlap
        counts = (overlap.files, len(overlap.exact), len(overlap.near), len(overlap.questions), overlap.words_alone)
        table.add_row(entry.name, *(f"{count:,}" for count in counts))
    console.print(table)
    overlap = held_out[0].overlap
    hashed = f"{overlap.training_files_compared:,} of {overlap.training_files:,}"
    console.print(f"Perceptual hashes compared for {hashed} training files; byte hashes for all.", style="dim")


def _show_problems(console: Console, problems: Sequence[Problem]) -> None:
    from rich.text import Text

    if all(problem.severity == "note" for problem in problems):
        console.print("No problems found.", style="green")
    for severity, color in COLORS.items():
        for problem in problems:
            if problem.severity == severity:
                line = Text.assemble((f"{severity}: ", color), problem.text, (f"  [{problem.setting}]", "dim"))
                console.print(line, soft_wrap=True)
