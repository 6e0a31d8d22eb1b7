"""Benchmarks: one file per benchmark, or per family with a shared scorer. Importing the package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation

__all__ = ["BENCHMARKS", "Benchmark", "Question", "Score", "conversation"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
