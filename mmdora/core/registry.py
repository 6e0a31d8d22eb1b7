"""One registry for everything that a config names: exact names, duplicates raise, a miss suggests the nearest name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from mmdora.core.errors import UserError

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or the empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


class Registry(Generic[T]):
    """A mapping from exact names to entries of one kind.

    >>> METHODS: Registry[type] = Registry("adapter method")
    >>> @METHODS.register("dora")
    ... class DoRA: ...
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that files its target under `name`; a second entry of that name is an error."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            known = sorted(self._entries)
            raise UserError(f"unknown {self.kind} {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def items(self) -> list[tuple[str, T]]:
        return sorted(self._entries.items())


def import_plugins(names: list[str]) -> None:
    """Import the modules that register what a config then names. Raises UserError for one that cannot be found."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins: cannot import {name!r} ({error})") from error
