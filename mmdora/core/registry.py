"""Registries of everything that a config refers to by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from mmdora.core.errors import UserError

T = TypeVar("T")


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


class Registry(Generic[T]):
    """A mapping from exact names to entries of one kind. Duplicate names raise; unknown names suggest the nearest one.

    >>> METHODS: Registry[type] = Registry("adapter method")
    >>> @METHODS.register("dora")
    ... class DoRA: ...

    Args:
        kind: What an entry is, for error messages.
        built_in: Names of built-in entries, each with the module that registers it. The module is imported when its
            entry is first looked up, so that names can be checked without importing heavy libraries.
    """

    def __init__(self, kind: str, built_in: Mapping[str, str] | None = None):
        self.kind = kind
        self._built_in = dict(built_in or {})
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its target as `name`. Raises ValueError if the name is taken."""

        def add(entry: T) -> T:
            module = self._built_in.get(name)
            reserved = module is not None and getattr(entry, "__module__", None) != module
            if name in self._entries or reserved:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self:
            known = list(self)
            raise UserError(f"unknown {self.kind} {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
        if name not in self._entries:
            importlib.import_module(self._built_in[name])
        return self._entries[name]

    def check(self, name: str) -> None:
        """Raise UserError for an unknown name, without importing a built-in entry."""
        if name not in self:
            self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._built_in

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries.keys() | self._built_in.keys()))

    def items(self) -> list[tuple[str, T]]:
        return [(name, self[name]) for name in self]


def import_plugins(names: Sequence[str]) -> None:
    """Import modules that register further entries. Raises UserError for a module that cannot be found."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"plugins: cannot import {name!r} ({error})") from error
