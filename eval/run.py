"""One benchmark from questions to report: the three stages in order, and what the receipt says of them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.encoding import Encoder
from data_pipelines.video import resolve_reader
from eval.benchmarks import BENCHMARKS, Question
from eval.generation import answer_all, weights_digest
from eval.scoring import make_report, score_all, write_results
from mmdora.config import EvaluationConfig


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
) -> dict[str, Any]:
    """Generate, score and report into `folder`; returns the report. `origin` says in the receipt where the model is
    from."""
    import torch
    import transformers

    weights = weights_digest(model)
    limits = (config.batch_size, config.max_new_tokens)
    responses = answer_all(model, encoder, questions, folder, *limits, weights, advance)
    scores = score_all(config.benchmark, responses, questions)
    receipt = {
        **(origin or {}),
        "weights": weights,
        "prompt": encoder.render(questions[0].sample, add_generation_prompt=True),
        "num_frames": encoder.video.num_frames,
        "video_reader": resolve_reader(encoder.video.reader),
        "decoding": f"greedy, at most {config.max_new_tokens} new tokens",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "data": config.data,
        "limit": config.limit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    report = make_report(config, responses, questions, scores, receipt)
    if int(os.environ.get("RANK", "0")) == 0:
        write_results(folder, responses, questions, scores, report)
    return report
