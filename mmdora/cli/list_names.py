"""`mmdora list`. The file is not called list.py: a module of that name would hide the builtin in this package."""

from __future__ import annotations

import importlib
import inspect
from itertools import takewhile
from typing import Annotated, Any

import typer

from mmdora.cli.app import app

REGISTRIES = {
    "adapters": ("mmdora.adapters", "ADAPTERS"),
    "vision-encoders": ("mmdora.core.vision_encoders", "VISION_ENCODERS"),
    "architectures": ("mmdora.models.architectures", "ARCHITECTURES"),
    "formats": ("data_pipelines.formats", "DATASET_FORMATS"),
    "video-readers": ("data_pipelines.video", "VIDEO_READERS"),
    "benchmarks": ("eval.benchmarks", "BENCHMARKS"),
}


@app.command("list")
def list_names(
    kind: Annotated[
        str,
        typer.Argument(help="adapters, vision-encoders, architectures, formats, video-readers, benchmarks or configs"),
    ],
) -> None:
    """List the names that a config can use."""
    from mmdora.core.errors import UserError
    from mmdora.core.registry import nearest

    kinds = [*REGISTRIES, "configs"]
    if kind not in kinds:
        raise UserError(f"cannot list {kind!r}.{nearest(kind, kinds)} Known: {', '.join(kinds)}")
    rows = _config_rows() if kind == "configs" else _registry_rows(kind)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for *cells, last in rows:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
        typer.echo("  ".join([*padded, last]).rstrip())


def _config_rows() -> list[tuple[str, ...]]:
    """Return the shipped configs, each with the first sentence of its comment."""
    from mmdora.core.config_files import shipped_configs, shipped_name

    rows: list[tuple[str, ...]] = []
    for path in shipped_configs():
        _, *lines = path.read_text(encoding="utf-8").splitlines()  # the first line is the launch command
        comment = takewhile(lambda line: line.startswith("#"), lines)
        text = " ".join(line.removeprefix("#").strip() for line in comment).strip()
        rows.append((shipped_name(path), text.partition(". ")[0].removesuffix(".") + "."))
    return rows


def _registry_rows(kind: str) -> list[tuple[str, ...]]:
    module, registry = REGISTRIES[kind]
    entries = getattr(importlib.import_module(module), registry).items()
    return [(name, *_describe(kind, entry)) for name, entry in entries]


def _describe(kind: str, entry: Any) -> tuple[str, ...]:
    """Return an entry's columns: an architecture's parts, or the first line of a docstring (the entry's or its
    module's), after a benchmark's state of verification."""
    if kind == "architectures":
        return (", ".join(f"{part}: {' + '.join(paths)}" for part, paths in entry.parts.items()),)
    module = inspect.getmodule(entry)
    text = (entry.__doc__ or (module.__doc__ if module else None) or "").strip().splitlines()
    line = text[0] if text else ""
    if kind == "benchmarks":
        return "verified" if entry.verified else "layout from documentation only", line
    return (line,)
