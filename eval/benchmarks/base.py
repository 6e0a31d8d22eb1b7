"""What a benchmark is: questions read from its official files, a scorer, and the file that its leaderboard takes.
BENCHMARKS names them all.

A benchmark is one class in one file of this folder (a family that shares its scorer is one file). It says how its
questions are read (`questions`), what an answer is worth (`score`, or `score_all` where answers are worth something
only together), how worths become the official figure (`headline`, the mean unless it says otherwise), and how
predictions are read and handed in (`read_predictions`, `write_submission`). It holds no state and touches no model.
"""

from __future__ import annotations

import logging
import string
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
    """One question: the conversation up to the answer, and what the answer is held against.

    `references` is empty where the split's answers are not public. `cluster` names what questions share (their image
    or video): intervals resample clusters. `categories` are the breakdowns it counts in, as "duration: short".
    `details` is what else the scorer or the leaderboard's file needs, of JSON's types.
    """

    id: str
    sample: Sample
    references: tuple[str, ...]
    cluster: str
    categories: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One answer's worth: as the official code counts it, and with what cannot be parsed counted as wrong.

    `counts` are further numbers that `headline` finds summed over the questions.
    """

    official: float
    strict: float
    unparsed: bool = False
    counts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_words(cls, value: float, response: str) -> Score:
        """Of an answer in free words: only silence cannot be parsed."""
        unparsed = not response.strip()
        return cls(value, 0.0 if unparsed else value, unparsed)


class Benchmark(ABC):
    """A benchmark is stateless; its docstring's first line says what it is and names the official scorer.

    The order below is that of an evaluation: what is read and asked, what an answer is worth, what a judge says, which
    files come in and go out. A benchmark needs `questions` and `score`; what else it defines is what it does otherwise.
    """

    # What is read and asked.
    layout: ClassVar[str] = ""  # the official files as downloaded, told to whoever has them elsewhere
    verified: ClassVar[bool] = False  # whether it was tried on the real files, or is from documentation only
    splits: ClassVar[tuple[str, ...]] = ()  # that `split` may name; the first is taken where it names none
    settings: ClassVar[tuple[str, ...]] = ("media",)  # which of media, format and where it heeds
    prompt: ClassVar[str] = "{question}\nAnswer the question using a single word or phrase."  # LLaVA-1.5's
    max_new_tokens: ClassVar[int] = 16  # where the evaluation's config says none
    compares_features: ClassVar[bool] = False  # answered by comparing features (eval/features.py), not by generating
    # What an answer is worth.
    version: ClassVar[int] = 1  # goes up when the same answers would score otherwise: such results are not compared
    bounds: ClassVar[Bounds] = PERCENT  # of the headline: the least and the most it can be; None where it has no most
    has_official: ClassVar[bool] = True  # False where an answer is worth what a judge says, and without one nothing
    has_strict: ClassVar[bool] = True  # False where no answer can fail to be parsed: captions, retrieval
    missing_is_wrong: ClassVar[bool] = False  # official code that scores a question without a prediction as wrong
    # What a judge says.
    judge_version: ClassVar[int] = 1  # goes up when a judge would be asked about the same answer in other words

    @abstractmethod
    def questions(self, config: EvaluationConfig) -> list[Question]:
        """Read `config.data`, the folder as downloaded or its questions' file, without opening any media.

        Raises UserError that names a missing or misplaced file and the layout expected.
        """

    def check_settings(self, config: EvaluationConfig) -> None:
        """Raises UserError for a setting of the data that would have no effect."""
        heeded = (*self.settings, *(("split",) if self.splits else ()))
        for key in ("split", "format", "media", "where"):
            if getattr(config, key) and key not in heeded:
                raise UserError(f"{key}: {config.benchmark} has nothing to do with it; leave it out")

    def split(self, config: EvaluationConfig) -> str:
        """The split asked for, or the first. Raises UserError for one that the benchmark has not."""
        if config.split is None:
            return self.splits[0]
        if config.split not in self.splits:
            raise UserError(f"split {config.split!r}: {config.benchmark} has {', '.join(self.splits)}")
        return config.split

    def ask(self, config: EvaluationConfig, **fields: str) -> str:
        """The user's words: the prompt, the benchmark's own or `config.prompt`, with `{question}` and such filled in.

        Raises UserError for a prompt with a field that the benchmark does not fill in, or without `{question}`, where
        there are questions to fill in.
        """
        template = config.prompt or self.prompt
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise UserError(f"prompt: {template!r} ({error}); a brace that is meant is doubled") from None
        if unknown := named - fields.keys():
            known = ", ".join(f"{{{name}}}" for name in fields) or "nothing"
            raise UserError(f"prompt: {config.benchmark} fills in {known}, not {{{sorted(unknown)[0]}}}")
        if "question" in fields and "question" not in named:
            raise UserError(f"prompt: {template!r} has no {{question}}")
        return template.format(**fields)

    def lacks(self, config: EvaluationConfig) -> str | None:
        """What is missing that asking needs, beside the media, and scoring does not; in words that say what to do."""
        return None

    def prediction(self, response: str) -> str:
        """A model's words as they are handed to the official scorer and to the leaderboard: as they are, or as LLaVA's
        conversion leaves them. Predictions in an official format are taken to be that already."""
        return response

    @abstractmethod
    def score(self, response: str, question: Question) -> Score:
        """Pure: the same answer always scores the same. Never raises, whatever was said."""

    def score_all(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Score]:
        """Every question's score by id. For benchmarks whose answers are worth something only together."""
        return {q.id: self.score(responses[q.id], q) for q in questions}

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """The figure that leaderboards show, in their unit, from sums over questions.

        `totals` holds "n", "official", "strict" and every name in `Score.counts`, each an array [draws]; `kind` is
        "official" or "strict". The default is the mean in percent.
        """
        return 100 * totals[kind] / totals["n"]

    @property
    def headline_is_mean(self) -> bool:
        return type(self).headline is Benchmark.headline

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        """Further official figures over the whole set, for `metrics` in report.json."""
        return {}

    @property
    def is_judged(self) -> bool:
        return type(self).judge_prompt is not Benchmark.judge_prompt

    def judge_prompt(self, response: str, question: Question) -> str:
        """What a judge (a language model) is asked about an answer, where the benchmark is judged."""
        raise NotImplementedError

    def judge_score(self, verdict: str) -> float | None:
        """A verdict's worth from 0 to 1; None where it cannot be read."""
        raise NotImplementedError

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """(question id, prediction) from a file of the official format; of ours (responses.jsonl) by default."""
        return [(question_id, self.prediction(said)) for question_id, said in read_answers(path)]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """The file that the leaderboard takes. Raises UserError where the results are not what it wants."""
        raise UserError(f"{results[0].folder}: this benchmark has no leaderboard to hand answers in to")

    def only_result(self, results: Sequence[Result], wanted: str | None = None) -> Result:
        """The result, where the leaderboard takes one. `wanted` is the split that it ranks: of one whose answers are
        public, the file is only good to try. Raises UserError for several."""
        if len(results) > 1:
            raise UserError(f"{results[0].benchmark} takes one result; {results[1].folder} is another")
        if wanted is not None and any(row["references"] for row in results[0].rows):
            log.warning("%s: its answers are public; the leaderboard ranks %s", results[0].folder, wanted)
        return results[0]


def conversation(question_id: str, text: str, media: Sequence[Image | Video] = (), source: str = "") -> Sample:
    """A single user message: the media first, and then the words."""
    return Sample(question_id, (Message("user", (*media, Text(text))),), source)


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark")
