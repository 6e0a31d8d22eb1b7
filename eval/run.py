"""One benchmark from questions to report: the three stages in order, and what the receipt says of them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from data_pipelines.encoding import Encoder
from data_pipelines.video import resolve_reader
from eval.benchmarks import BENCHMARKS, Question
from eval.generation import answer_all, question_key, weights_digest
from eval.scoring import make_report, read_report, score_all, write_results
from mmdora.config import EvaluationConfig
from mmdora.errors import UserError


def read_questions(config: EvaluationConfig) -> list[Question]:
    """The benchmark's questions, cut to `limit`. Raises UserError for data that is missing or of another layout."""
    return BENCHMARKS[config.benchmark]().questions(config)[: config.limit]


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
) -> dict[str, Any]:
    """Generate, score and report into `folder`; returns the report. `origin` says in the receipt where the model is
    from; `weights` is a digest of them, for a model whose weights no process has as a whole.

    A finished result of the very same questions and weights is returned as it is. Raises UserError where `folder`
    holds the result of another evaluation, unless `overwrite` says that it may go.
    """
    weights = weights or weights_digest(model)
    limits = (config.batch_size, config.max_new_tokens)
    keys = {q.id: question_key(q, encoder, config.max_new_tokens, weights) for q in questions}
    receipt = {**(origin or {}), **_receipt(model, encoder, config, questions), "weights": weights}
    receipt["questions"] = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:32]
    if (folder / "report.json").exists() and not overwrite:
        report = read_report(folder)
        if (report["benchmark"], report["receipt"]["questions"]) == (config.benchmark, receipt["questions"]):
            advance(len(questions))
            return report
        changed = [k for k, v in receipt.items() if k != "questions" and report["receipt"].get(k, v) != v]
        raise UserError(
            f"{folder} holds a finished result with other {' and '.join(changed) or 'questions'}; "
            "--overwrite replaces it, --out puts the new one elsewhere"
        )
    responses = answer_all(model, encoder, questions, keys, folder, *limits, advance)
    scores = score_all(config.benchmark, responses, questions)
    report = make_report(config, responses, questions, scores, receipt)
    if int(os.environ.get("RANK", "0")) == 0:
        write_results(folder, responses, questions, scores, report)
    return report


def _receipt(model: Any, encoder: Encoder, config: EvaluationConfig, questions: list[Question]) -> dict[str, Any]:
    """What the numbers depend on, for people to read."""
    return {
        "data": config.data,
        "limit": config.limit,
        "prompt": encoder.render(questions[0].sample, add_generation_prompt=True),
        "num_frames": encoder.video.num_frames,
        "video_reader": resolve_reader(encoder.video.reader),
        "decoding": f"greedy, at most {config.max_new_tokens} new tokens",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
