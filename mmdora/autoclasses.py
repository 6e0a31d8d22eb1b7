"""transformers' Auto classes know mmdora's own vision encoders after a bare `import mmdora`.

Registering them imports torch, which `import mmdora` must not do: the command line would take seconds to answer. So it
waits until something else has imported the Auto classes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
# What the encoders' files import: half-way through one of these, they cannot be imported yet.
NEEDED = (AUTO_CONFIG, "transformers.modeling_utils", "transformers.models.auto.modeling_auto")


class _Finder(MetaPathFinder):
    """Finds the modules in NEEDED as everyone else does, and hears when they are imported."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.begun: set[str] = set()
        self.done = {name for name in NEEDED if name in sys.modules}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in NEEDED or fullname in self.asked:
            return None
        self.asked.add(fullname)  # the other finders answer the question that follows
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Listening(spec.loader, self)
        return spec

    def imported(self, name: str) -> None:
        self.done.add(name)
        if AUTO_CONFIG in self.done and self.begun <= self.done:
            _register()


class _Listening(Loader):
    def __init__(self, loader: Loader, finder: _Finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.finder.begun.add(module.__name__)
        self.loader.exec_module(module)
        self.finder.imported(module.__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # what else a loader is asked for: sources, resources


def _register() -> None:
    importlib.import_module("mmdora.vision_encoders")


def register_when_needed() -> None:
    """Register now where the Auto classes are imported already, else when they are."""
    if AUTO_CONFIG in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
