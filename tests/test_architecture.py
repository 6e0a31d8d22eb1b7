"""Imports run one way, between folders and between files, and no file imports itself by a detour."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each folder with all that it may import. `mmdora/__init__.py` names the public functions, and may name any folder.
CORE = {"mmdora.core"}
MODELS = CORE | {"mmdora.models"}
ADAPTERS = MODELS | {"mmdora.adapters"}
TRAINING = ADAPTERS | {"data_pipelines", "mmdora.training"}
PLANNING = TRAINING | {"mmdora.planning"}
EVAL = PLANNING | {"mmdora.analysis", "mmdora.conversion", "eval"}
APPS = EVAL | {"mmdora.apps"}
MAY_IMPORT = {
    "mmdora.core": CORE,
    "data_pipelines": CORE | {"data_pipelines"},
    "mmdora.models": MODELS,
    "mmdora.adapters": ADAPTERS,
    "mmdora.training": TRAINING,
    "mmdora.planning": PLANNING,
    "mmdora.analysis": ADAPTERS | {"data_pipelines", "mmdora.analysis"},
    "mmdora.conversion": ADAPTERS | {"data_pipelines", "mmdora.conversion"},
    "eval": EVAL,
    "mmdora.apps": APPS,
    "mmdora.cli": APPS | {"mmdora.cli"},
    "train": {"mmdora.cli"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    module_name(path): path
    for path in (
        ROOT / "train.py",
        *(p for d in ("mmdora", "data_pipelines", "eval") for p in (ROOT / d).rglob("*.py")),
    )
}


def folder_of(module: str) -> str | None:
    """The folder of MAY_IMPORT that a module lies in; None for third-party modules and for `mmdora` itself."""
    return next((name for name in MAY_IMPORT if module == name or module.startswith(f"{name}.")), None)


def imports(source: str) -> Iterator[str]:
    """Every module that a file imports, anywhere in it: inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)


def violations(module: str, source: str) -> list[str]:
    """The imports of a file that the rule forbids."""
    allowed = MAY_IMPORT[folder_of(module) or ""]
    forbidden = [f"{module} imports {name}" for name in imports(source) if folder_of(name) not in {None, *allowed}]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name == "eval" for alias in node.names):
            forbidden.append(f"{module}: `import eval` hides the builtin")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            forbidden.append(f"{module}: star import")
    return forbidden


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder: str):
    found = {name: path for name, path in FILES.items() if folder_of(name) == folder}
    assert found, f"{folder} has no files"
    assert [v for name, path in found.items() for v in violations(name, path.read_text(encoding="utf-8"))] == []


def test_every_file_lies_in_a_folder_of_the_layout():
    assert [name for name in FILES if folder_of(name) is None] == ["mmdora._moved", "mmdora"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmdora.models.loading", "from eval.metrics import wilson"),
        ("mmdora.adapters.injection", "import data_pipelines.samples"),
        ("data_pipelines.dataset", "def f():\n    from eval.benchmarks import BENCHMARKS"),
        ("data_pipelines.dataset", "from mmdora.models.loading import load_model"),
        ("eval.run", "from mmdora.apps.train import train"),
        ("mmdora.apps.train", "import eval"),
        ("eval.run", "from mmdora.core.config import *"),
    ],
)
def test_the_rule_catches_a_violation(module: str, source: str):
    assert violations(module, source)


def test_no_import_cycles_between_files():
    """A package's own `__init__` counts as the files that it gathers: importing it from one of them is no cycle."""
    graph = {
        name: {other for other in imports(path.read_text(encoding="utf-8")) if other in FILES and other != name}
        for name, path in FILES.items()
        if not name.startswith("mmdora._") and name != "mmdora"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for other in graph.get(name, ()):
            if not name.startswith(f"{other}."):
                visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())
