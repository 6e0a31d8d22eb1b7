"""What answers each kind of case in the official scorers' vectors: a function from a case's input to its output, in the
file named for the benchmark's vectors or their family."""

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
    left_out: tuple[str, ...]  # keys of the expected output that say nothing of a score
    sometimes: tuple[str, ...]  # keys that not every case's expected output has


KINDS: dict[tuple[str, str], Kind] = {}


def official(
    file: str, kind: str, tolerance: float = 1e-9, left_out: tuple[str, ...] = (), sometimes: tuple[str, ...] = ()
) -> Callable:
    """Register what answers the cases of `kind` in `file`.json."""

    def register(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        assert (file, kind) not in KINDS, f"{file}: {kind!r} is answered twice"
        KINDS[file, kind] = Kind(answer, tolerance, left_out, sometimes)
        return answer

    return register


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
