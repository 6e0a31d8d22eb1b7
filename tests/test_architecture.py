"""The house rule: imports run one way, train.py → mmdora.commands → eval → data_pipelines → the rest of mmdora."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = {"train": 4, "mmdora.commands": 3, "eval": 2, "data_pipelines": 1, "mmdora": 0}
# Of mmdora, the pipelines see the config, the registry and the one error.
PIPELINES_SEE = ("mmdora.config", "mmdora.config_files", "mmdora.registry", "mmdora.errors")


def floor(module: str) -> int | None:
    matches = [name for name in FLOORS if module == name or module.startswith(f"{name}.")]
    return FLOORS[max(matches, key=len)] if matches else None


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(module: str, source: str) -> list[str]:
    """What the rule forbids in a file: looking up a floor, `import eval`, star imports."""
    tree = ast.parse(source)
    found = []
    here = floor(module)
    assert here is not None
    for name in imports(tree):
        there = floor(name)
        if there is not None and there > here:
            found.append(f"{module} imports {name}")
        if module.startswith("data_pipelines") and name.startswith("mmdora") and not name.startswith(PIPELINES_SEE):
            found.append(f"{module} imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name == "eval" for alias in node.names):
            found.append(f"{module}: `import eval` hides the builtin")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"{module}: star import")
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def files() -> list[Path]:
    return [
        ROOT / "train.py",
        *(p for d in ("mmdora", "data_pipelines", "eval") for p in sorted((ROOT / d).rglob("*.py"))),
    ]


@pytest.mark.parametrize("path", files(), ids=module_name)
def test_imports_run_one_way(path: Path):
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmdora.loading", "from eval.metrics import wilson"),
        ("mmdora.injection", "import data_pipelines.samples"),
        ("data_pipelines.dataset", "def f():\n    from eval.benchmarks import BENCHMARKS"),
        ("data_pipelines.dataset", "from mmdora.loading import load_model"),
        ("eval.run", "from mmdora.commands.train import run"),
        ("mmdora.commands.train", "import eval"),
        ("eval.run", "from mmdora.config import *"),
    ],
)
def test_the_rule_catches_a_violation(module: str, source: str):
    assert violations(module, source)


def test_no_circles_between_files():
    """Every module's top-level imports form a graph without circles."""
    graph: dict[str, set[str]] = {}
    names = {module_name(p): p for p in files()}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        graph[name] = {i for i in imports(top) if i in names and i != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                # A package's __init__ gathers its siblings; their importing the package's parent is not a circle.
                if not name.startswith(f"{other}."):
                    visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
