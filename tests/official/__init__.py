"""For each kind of case in the official scorers' vectors, a function from a case's input to its output.

Each file holds the kinds of one benchmark or family of benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


@dataclass(frozen=True)
class Kind:
    answer: Callable[[Any], Any]
    tolerance: float  # relative, of floats
    ignored: tuple[str, ...]  # keys of the expected output that are not scores
    optional: tuple[str, ...]  # keys that are missing from some cases' expected output


KINDS: dict[tuple[str, str], Kind] = {}


def official(
    file: str, kind: str, tolerance: float = 1e-9, ignored: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> Callable:
    """Register a function for the cases of `kind` in `file`.json."""

    def register(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        assert (file, kind) not in KINDS, f"{file}: {kind!r} is registered twice"
        KINDS[file, kind] = Kind(answer, tolerance, ignored, optional)
        return answer

    return register


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
