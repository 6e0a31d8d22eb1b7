"""What a benchmark is: questions read from files, and a scorer of one answer. BENCHMARKS names them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipelines.samples import Sample
from mmdora.config import EvaluationConfig
from mmdora.registry import Registry


@dataclass(frozen=True)
class Question:
    """One question: the conversation up to the answer, and what the answer is held against.

    `cluster` names what questions share (their image or video): intervals resample clusters.
    """

    id: str
    sample: Sample
    references: tuple[str, ...]
    cluster: str
    category: str | None = None


@dataclass(frozen=True)
class Score:
    """One answer's worth, from 0 to 1: as the official code counts it, and with what cannot be parsed counted as
    wrong."""

    official: float
    strict: float
    unparsed: bool = False


class Benchmark(ABC):
    """A benchmark is stateless; its docstring names the official scorer."""

    verified = False  # whether its layout was tried on the real files, or is known from documentation only

    @abstractmethod
    def questions(self, config: EvaluationConfig) -> list[Question]:
        """Read `config.data`. Raises UserError that names a missing or misplaced file and the layout expected."""

    @abstractmethod
    def score(self, response: str, question: Question) -> Score:
        """Pure: the same answer always scores the same."""

    def extras(self, responses: Mapping[str, str], questions: list[Question]) -> dict[str, Any]:
        """Further official figures over the whole set, for report.json."""
        return {}


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark")
