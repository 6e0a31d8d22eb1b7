"""`mmdora list`: what a config can name."""

from __future__ import annotations

import inspect
from typing import Any

from rich.table import Table

from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.video import VIDEO_READERS
from eval.benchmarks import BENCHMARKS
from mmdora.adapters import ADAPTERS
from mmdora.architectures import ARCHITECTURES
from mmdora.commands.console import make_console
from mmdora.errors import UserError
from mmdora.registry import nearest
from mmdora.vision_encoders import VISION_ENCODERS

KINDS: dict[str, Any] = {
    "adapters": ADAPTERS,
    "vision-encoders": VISION_ENCODERS,
    "architectures": ARCHITECTURES,
    "formats": DATASET_FORMATS,
    "video-readers": VIDEO_READERS,
    "benchmarks": BENCHMARKS,
}


def run(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"nothing is called {kind!r}.{nearest(kind, list(KINDS))} Known: {', '.join(KINDS)}")
    console = make_console()
    table = Table(show_header=False, box=None)
    for name, entry in KINDS[kind].items():
        table.add_row(name, about(kind, entry))
    console.print(table)


def about(kind: str, entry: Any) -> str:
    """One line on an entry: the parts of an architecture, else the first line of its docstring or its module's."""
    if kind == "architectures":
        return ", ".join(f"{part}: {' + '.join(paths)}" for part, paths in entry.parts.items())
    module = inspect.getmodule(entry)
    text = (entry.__doc__ or (module.__doc__ if module else None) or "").strip().splitlines()
    line = text[0] if text else ""
    if kind == "benchmarks":
        line += " [verified]" if entry.verified else " [layout from documentation only]"
    return line
