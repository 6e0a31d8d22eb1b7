"""`mmdora list`: what a config can name."""

from __future__ import annotations

import inspect
from typing import Any

from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.video import VIDEO_READERS
from eval.benchmarks import BENCHMARKS
from mmdora.adapters import ADAPTERS
from mmdora.core.console import make_console
from mmdora.core.errors import UserError
from mmdora.core.registry import nearest
from mmdora.models.architectures import ARCHITECTURES
from mmdora.models.vision_encoders import VISION_ENCODERS

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
    rows = [(name, *about(kind, entry)) for name, entry in KINDS[kind].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    console = make_console()
    for *cells, last in rows:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
        console.print("  ".join([*padded, last]).rstrip(), soft_wrap=True)


def about(kind: str, entry: Any) -> tuple[str, ...]:
    """What is told of an entry: the parts of an architecture, else the first line of its docstring or its module's; of
    a benchmark also whether its layout was tried on the real files."""
    if kind == "architectures":
        return (", ".join(f"{part}: {' + '.join(paths)}" for part, paths in entry.parts.items()),)
    module = inspect.getmodule(entry)
    text = (entry.__doc__ or (module.__doc__ if module else None) or "").strip().splitlines()
    line = text[0] if text else ""
    if kind == "benchmarks":
        return "verified" if entry.verified else "layout from documentation only", line
    return (line,)
