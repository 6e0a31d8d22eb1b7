"""Benchmarks, one file each (or one for a family that shares its scorer); importing the package registers them all."""

from eval.benchmarks import nlvr, vqa
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score

__all__ = ["BENCHMARKS", "Benchmark", "Question", "Score", "nlvr", "vqa"]
