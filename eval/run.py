"""One benchmark from questions to report: the three stages in order, and what the receipt says of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.encoding import Encoder
from data_pipelines.video import resolve_reader
from eval.benchmarks import BENCHMARKS, Question
from eval.digests import weights_digest
from eval.generation import answer_all
from eval.judge import describe_judge, judge_all
from eval.receipts import finished, receipt_of
from eval.responses import question_keys
from eval.scoring import make_report, score_all, write_results
from mmdora.core.config import EvaluationConfig
from mmdora.core.distributed import from_main, is_main
from mmdora.core.errors import UserError


def read_questions(config: EvaluationConfig, by_features: bool = False) -> list[Question]:
    """The benchmark's questions, cut to `limit`; their media are there.

    Raises UserError for data that is missing or of another layout, and for a benchmark that a model which generates
    (`by_features`: one that gives features) cannot answer.
    """
    benchmark = BENCHMARKS[config.benchmark]()
    if benchmark.compares_features and not by_features:
        how = f"mmdora eval MODEL --benchmark {config.benchmark}"
        raise UserError(f"{config.benchmark} is not answered in words; score a CLIP-like model with `{how}`")
    benchmark.check_settings(config)
    if missing := benchmark.missing_input(config):
        raise UserError(missing)
    if config.judge is not None:
        describe_judge(benchmark, config.judge)
    questions = ask_nothing_twice(benchmark.questions(config), config)[: config.limit]
    media = {part.path for q in questions for part in q.sample.media() if part.data is None}
    if absent := sorted(path for path in media if not path.exists()):
        expected = f"; expected layout:\n{benchmark.layout}" if benchmark.layout else ""
        raise UserError(f"{len(absent)} of {len(media)} media files are missing, such as {absent[0]}{expected}")
    return questions


def ask_nothing_twice(questions: list[Question], config: EvaluationConfig) -> list[Question]:
    """The questions as they are. Raises UserError where there are none, or two have the same id."""
    if not questions:
        raise UserError(f"{config.data}: no questions for {config.benchmark}")
    doubled = [i for i, count in Counter(q.id for q in questions).items() if count > 1]
    if doubled:
        raise UserError(f"{config.data}: {len(doubled)} ids are given to several questions, such as {doubled[0]!r}")
    return questions


def length_of_answers(config: EvaluationConfig) -> int:
    """In tokens: the config's, or the benchmark's own."""
    return config.max_new_tokens or BENCHMARKS[config.benchmark].max_new_tokens


def evaluate(
    model: Any,
    encoder: Encoder,
    config: EvaluationConfig,
    questions: list[Question],
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    weights: str | None = None,
    contamination: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Generate, score and report into `folder`; returns the report. `origin` says in the receipt where the model is
    from; `weights` is a digest of them, for a model whose weights no process has as a whole, or that is known already;
    `contamination` tells, once all questions are answered, what was trained on, by the entry's name for the receipt.

    A finished result of the very same questions and weights is returned as it is. Raises UserError where `folder`
    holds the result of another evaluation, unless `overwrite` says that it may go; RunError where questions could not
    be answered: then there is no report. Rank 0 alone scores, which may take a judge or Java.
    """
    benchmark, weights = BENCHMARKS[config.benchmark](), weights or weights_digest(model)
    limits = (config.batch_size, length_of_answers(config))
    keys = question_keys(questions, encoder, length_of_answers(config), weights)
    receipt = {**(origin or {}), **_receipt(model, encoder, config, questions), "weights": weights}
    if benchmark.is_judged:
        receipt["judge"] = config.judge and describe_judge(benchmark, config.judge)
    receipt["questions"] = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:32]
    if not overwrite and (report := finished(folder, config.benchmark, receipt)) is not None:
        advance(len(questions))
        return report
    if is_main():
        (folder / "report.json").unlink(missing_ok=True)  # of answers that are replaced now
    responses = answer_all(model, encoder, questions, keys, folder, *limits, advance)
    responses = {question_id: benchmark.prediction(said) for question_id, said in responses.items()}
    report = None
    if is_main():
        if contamination is not None:
            receipt["contamination"] = contamination()[config.name]
        scores, judged = score_all(config.benchmark, responses, questions), None
        if config.judge is not None and all(q.references for q in questions):
            judged = judge_all(benchmark, config.judge, responses, questions, folder)
        report = make_report(config, responses, questions, scores, receipt, judged)
        write_results(folder, responses, questions, scores, report, judged)
    return dict(from_main(report))


def _receipt(model: Any, encoder: Encoder, config: EvaluationConfig, questions: list[Question]) -> dict[str, Any]:
    """What the numbers depend on, for people to read."""
    return {
        **receipt_of(config),
        "prompt": encoder.render(questions[0].sample, add_generation_prompt=True),
        "num_frames": encoder.video.num_frames,
        "video_reader": resolve_reader(encoder.video.reader),
        "decoding": f"greedy, at most {length_of_answers(config)} new tokens",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
