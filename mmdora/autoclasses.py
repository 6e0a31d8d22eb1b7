"""transformers' Auto classes know mmdora's own models after a bare `import mmdora`: its vision encoders, and LLaVA with
a resampler.

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
MODELS = ("mmdora.models.vision_encoders", "mmdora.models.llava_resampler")  # each registers what it defines


class _Finder(MetaPathFinder):
    """Finds transformers' modules as everyone else does, and hears when they are imported.

    Many of them import the Auto classes half-way through, and mmdora's models need those modules whole: so it waits
    until none is being imported.
    """

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.running = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("transformers.") or fullname in self.asked:
            return None
        self.asked.add(fullname)  # the other finders answer the question that follows
        spec = importlib.util.find_spec(fullname)
        self.asked.discard(fullname)  # one whose import fails is asked for again
        if spec is not None and spec.loader is not None:
            spec.loader = _Listening(spec.loader, self)
        return spec

    def end(self) -> None:
        self.running -= 1
        if self.running == 0 and AUTO_CONFIG in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            _register()


class _Listening(Loader):
    def __init__(self, loader: Loader, finder: _Finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.finder.running += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # what else a loader is asked for: sources, resources


def _register() -> None:
    for name in MODELS:
        importlib.import_module(name)


def register_when_needed() -> None:
    """Register now where the Auto classes are imported already, else when they are."""
    if AUTO_CONFIG in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
