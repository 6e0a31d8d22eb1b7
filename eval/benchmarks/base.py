"""Base class of all benchmarks, and the registry BENCHMARKS.

A benchmark is one class in one file of this folder; a family that shares its scorer is one file. The class reads
questions from the official files (`questions`), scores responses (`score`, or `score_all` if a score depends on several
responses), aggregates scores into the official figure (`headline`, by default the mean), reads predictions in official
formats (`read_predictions`) and writes the leaderboard's file (`write_submission`). It is stateless and runs no model.
"""

from __future__ import annotations

import logging
import string
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_pipelines.samples import Image, Message, Sample, Text, Video
from eval.layout import read_answers
from eval.metrics import PERCENT, Bounds, Totals
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError
from mmdora.core.registry import Registry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One question: the conversation up to the answer, and the reference answers.

    `references` is empty if the split's answers are not public. `cluster` identifies the image or video that questions
    share: confidence intervals resample clusters. `categories` are the breakdowns that the question belongs to, such as
    "duration: short". `details` holds JSON values that the scorer or the submission needs in addition.
    """

    id: str
    sample: Sample
    references: tuple[str, ...]
    cluster: str
    categories: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """Score of one response: `official` as the official code counts it, `strict` with unparsed responses as wrong.

    `counts` are additional numbers; `headline` receives their sums over the questions.
    """

    official: float
    strict: float
    unparsed: bool = False
    counts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def free_text(cls, value: float, response: str) -> Score:
        """Return the score of a free-text response, which is unparsed only if it is blank."""
        unparsed = not response.strip()
        return cls(value, 0.0 if unparsed else value, unparsed)

    @classmethod
    def of_words(cls, value: float, response: str) -> Score:
        """Deprecated name of `free_text`."""
        warnings.warn("Score.of_words is now Score.free_text", DeprecationWarning, stacklevel=2)
        return cls.free_text(value, response)


class Benchmark(ABC):
    """Base class of benchmarks. `mmdora list benchmarks` prints the first line of the subclass's docstring.

    Members are in the order of an evaluation: data and prompt, scores, judge, files. A subclass defines `questions` and
    `score`, and overrides only what differs from the defaults.
    """

    # Data and prompt
    layout: ClassVar[str] = ""  # the official files as downloaded; shown when a file is missing
    verified: ClassVar[bool] = False  # True if tested on the real files, False if written from documentation only
    splits: ClassVar[tuple[str, ...]] = ()  # valid values of `split`; the first is the default
    settings: ClassVar[tuple[str, ...]] = ("media",)  # which of `media`, `format` and `where` the benchmark uses
    prompt: ClassVar[str] = "{question}\nAnswer the question using a single word or phrase."  # LLaVA-1.5's
    max_new_tokens: ClassVar[int] = 16  # default if the evaluation's config sets none
    compares_features: ClassVar[bool] = False  # answered by comparing features (eval/features.py), not by generating
    # Scores
    version: ClassVar[int] = 1  # raise it when scores change: results of two versions are not compared
    bounds: ClassVar[Bounds] = PERCENT  # minimum and maximum of the headline; None if it has no maximum
    has_official: ClassVar[bool] = True  # False if only a judge can score responses
    has_strict: ClassVar[bool] = True  # False if every response can be parsed: captions, retrieval
    missing_is_wrong: ClassVar[bool] = False  # True if the official code scores a missing prediction as wrong
    # Judge
    judge_version: ClassVar[int] = 1  # raise it when `judge_prompt` changes

    @abstractmethod
    def questions(self, config: EvaluationConfig) -> list[Question]:
        """Read the questions from `config.data`, the folder as downloaded or the question file. Open no media.

        Raises:
            UserError: a file is missing or malformed; the message shows the expected layout.
        """

    def check_settings(self, config: EvaluationConfig) -> None:
        """Raise UserError for a data setting that would have no effect."""
        supported = (*self.settings, *(("split",) if self.splits else ()))
        for key in ("split", "format", "media", "where"):
            if getattr(config, key) and key not in supported:
                raise UserError(f"{key}: not supported by the benchmark {config.benchmark!r}; remove it")

    def split(self, config: EvaluationConfig) -> str:
        """Return `config.split`, or the default split. Raise UserError for an unknown one."""
        if config.split is None:
            return self.splits[0]
        if config.split not in self.splits:
            raise UserError(
                f"split: {config.benchmark} has no split {config.split!r}; choose from {', '.join(self.splits)}"
            )
        return config.split

    def format_prompt(self, config: EvaluationConfig, **fields: str) -> str:
        """Fill `fields` into `config.prompt`, or into the benchmark's own prompt if the config sets none.

        Raises:
            UserError: the prompt has a field that is not in `fields`, or lacks `{question}` although that is a field.
        """
        template = config.prompt or self.prompt
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise UserError(f"prompt: {template!r}: {error}; write a literal brace as {{{{ or }}}}") from None
        if unknown := named - fields.keys():
            known = ", ".join(f"{{{name}}}" for name in fields) or "no fields"
            raise UserError(f"prompt: unknown field {{{sorted(unknown)[0]}}}; {config.benchmark} provides {known}")
        if "question" in fields and "question" not in named:
            raise UserError(f"prompt: {template!r} has no {{question}}")
        return template.format(**fields)

    def ask(self, config: EvaluationConfig, **fields: str) -> str:
        """Deprecated name of `format_prompt`."""
        warnings.warn("Benchmark.ask is now Benchmark.format_prompt", DeprecationWarning, stacklevel=2)
        return self.format_prompt(config, **fields)

    def missing_input(self, config: EvaluationConfig) -> str | None:
        """Return an error message if a file that generation needs and scoring does not (media aside) is missing."""
        return None

    def prediction(self, response: str) -> str:
        """Return a model's response as the official scorer and the leaderboard receive it.

        By default the response is unchanged; some benchmarks apply LLaVA's conversion script. Predictions read from a
        file in the official format are already converted.
        """
        return response

    @abstractmethod
    def score(self, response: str, question: Question) -> Score:
        """Score one response. The same response always gets the same score; no response raises an error."""

    def score_all(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Score]:
        """Return scores by question id. Override it if the score of a question depends on several responses."""
        return {q.id: self.score(responses[q.id], q) for q in questions}

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """Compute the leaderboard's figure, in its unit, from sums over questions. The default is the mean in percent.

        Args:
            totals: "n", "official", "strict" and every name in `Score.counts`, each an array [draws].
            kind: "official" or "strict".
        """
        return 100 * totals[kind] / totals["n"]

    @property
    def headline_is_mean(self) -> bool:
        return type(self).headline is Benchmark.headline

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        """Return additional official figures over the whole set, for `metrics` in report.json."""
        return {}

    @property
    def is_judged(self) -> bool:
        return type(self).judge_prompt is not Benchmark.judge_prompt

    def judge_prompt(self, response: str, question: Question) -> str:
        """Return the prompt that asks a judge (a language model) to grade a response."""
        raise NotImplementedError

    def judge_score(self, verdict: str) -> float | None:
        """Return the grade in a judge's verdict, 0 to 1, or None if there is none to read."""
        raise NotImplementedError

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read (question id, prediction) pairs from an official file. The default reads mmdora's responses.jsonl."""
        return [(question_id, self.prediction(response)) for question_id, response in read_answers(path)]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write the leaderboard's file. Raise UserError if it needs other or more results."""
        raise UserError(f"{results[0].folder}: the benchmark {results[0].benchmark!r} has no leaderboard to submit to")

    def single_result(self, results: Sequence[Result], ranked_split: str | None = None) -> Result:
        """Return the result, for a leaderboard that takes exactly one. Raise UserError for several.

        Warn if the leaderboard ranks `ranked_split` but the result's answers are public: its file is only a test.
        """
        if len(results) > 1:
            raise UserError(f"{results[1].folder}: {results[0].benchmark} takes one result, and this is the second")
        if ranked_split is not None and any(row["references"] for row in results[0].rows):
            log.warning("%s: this split has public answers; the leaderboard ranks %s", results[0].folder, ranked_split)
        return results[0]


def conversation(question_id: str, text: str, media: Sequence[Image | Video] = (), source: str = "") -> Sample:
    """Return a sample with a single user message: the media first, then the text."""
    return Sample(question_id, (Message("user", (*media, Text(text))),), source)


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark")
