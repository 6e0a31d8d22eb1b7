"""Read a benchmark's questions and check them, before a model is loaded; imports neither torch nor transformers."""

from __future__ import annotations

from collections import Counter

from eval.benchmarks import BENCHMARKS, Question
from eval.judge import describe_judge
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError


def read_questions(config: EvaluationConfig, by_features: bool = False) -> list[Question]:
    """Return the benchmark's questions, cut to `limit`, once all their media files are known to exist.

    `by_features` says that the model embeds texts and images (CLIP) instead of generating text.

    Raises UserError for missing data, data of another layout, and a benchmark that such a model cannot answer.
    """
    benchmark = BENCHMARKS[config.benchmark]()
    if benchmark.compares_features and not by_features:
        raise UserError(
            f"{config.benchmark} compares embeddings and needs no generated text; evaluate a CLIP-like model with "
            f"`mmdora eval MODEL --benchmark {config.benchmark}`"
        )
    benchmark.check_settings(config)
    if missing := benchmark.missing_input(config):
        raise UserError(missing)
    if config.judge is not None:
        describe_judge(benchmark, config.judge)
    questions = check_ids(benchmark.questions(config), config)[: config.limit]
    media = {part.path for q in questions for part in q.sample.media() if part.data is None}
    if absent := sorted(path for path in media if not path.exists()):
        expected = f"; expected layout:\n{benchmark.layout}" if benchmark.layout else ""
        raise UserError(f"{len(absent)} of {len(media)} media files are missing, such as {absent[0]}{expected}")
    return questions


def check_ids(questions: list[Question], config: EvaluationConfig) -> list[Question]:
    """Return the questions. Raise UserError if there are none, or if two have the same id."""
    if not questions:
        raise UserError(f"{config.data}: no questions for {config.benchmark}")
    duplicates = [i for i, count in Counter(q.id for q in questions).items() if count > 1]
    if duplicates:
        raise UserError(f"{config.data}: {len(duplicates)} question ids are not unique, such as {duplicates[0]!r}")
    return questions


def max_new_tokens_for(config: EvaluationConfig) -> int:
    """Return the most tokens to generate for an answer: the config's number, or the benchmark's own."""
    return config.max_new_tokens or BENCHMARKS[config.benchmark].max_new_tokens
