"""Evaluate one benchmark on a model that generates text, from questions to report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.encoding import Encoder
from data_pipelines.video import resolve_reader
from eval.benchmarks import BENCHMARKS, Question
from eval.digests import json_digest, weights_digest
from eval.generation import answer_all
from eval.judge import describe_judge, judge_all
from eval.questions import max_new_tokens_for, read_questions
from eval.receipts import common_receipt, reuse_report
from eval.responses import question_keys
from eval.scoring import score_and_write
from mmdora.adapters.temporary_merge import merged_weights
from mmdora.core.config import EvaluationConfig
from mmdora.core.distributed import from_main, is_main

__all__ = ["evaluate", "read_questions"]


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
    merge_memory: float | None = None,
) -> dict[str, Any]:
    """Generate answers, score them and write the report into `folder`; every process returns the report.

    An adapter is merged into the weights while the answers are generated, and separate again afterwards.

    A finished result of the same questions and weights is returned unchanged. Only rank 0 scores, since scoring may
    call a judge or Java.

    Args:
        advance: called with the number of questions answered since the last call.
        origin: where the model comes from, for the receipt.
        weights: the digest of the weights. Give it if no process holds all of them, or if it is known already.
        contamination: called after generation; returns the contamination part of the receipt by entry name.
        merge_memory: most host memory for the unmerged weights, in GiB (`merged_weights`).

    Raises:
        UserError: `folder` holds the result of another evaluation and `overwrite` is not set.
        RunError: some questions could not be answered. No report is written then.
    """
    benchmark, weights = BENCHMARKS[config.benchmark](), weights or weights_digest(model)
    max_new_tokens = max_new_tokens_for(config)
    keys = question_keys(questions, encoder, max_new_tokens, weights)
    receipt = {**(origin or {}), **_receipt(model, encoder, config, questions), "weights": weights}
    if benchmark.is_judged:
        receipt["judge"] = config.judge and describe_judge(benchmark, config.judge)
    receipt["questions"] = json_digest(keys, sort_keys=True)
    if (report := reuse_report(folder, config.benchmark, receipt, overwrite)) is not None:
        advance(len(questions))
        return report
    with merged_weights(model, merge_memory) as adapter:
        responses = answer_all(model, encoder, questions, keys, folder, config.batch_size, max_new_tokens, advance)
    if adapter is not None:
        receipt["adapter_weights"] = adapter
    responses = {question_id: benchmark.prediction(response) for question_id, response in responses.items()}
    if is_main():
        if contamination is not None:
            receipt["contamination"] = contamination()[config.name]
        judged = None
        if config.judge is not None and all(q.references for q in questions):
            judged = judge_all(benchmark, config.judge, responses, questions, folder)
        report = score_and_write(folder, config, responses, questions, receipt, judged)
    return dict(from_main(report))


def _receipt(model: Any, encoder: Encoder, config: EvaluationConfig, questions: list[Question]) -> dict[str, Any]:
    """Return the human-readable settings that the scores depend on."""
    return {
        **common_receipt(config),
        "prompt": encoder.render(questions[0].sample, add_generation_prompt=True),
        "num_frames": encoder.video.num_frames,
        "video_reader": resolve_reader(encoder.video.reader),
        "decoding": f"greedy, at most {max_new_tokens_for(config)} new tokens",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
