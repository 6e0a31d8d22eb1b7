"""Score existing predictions against a benchmark's official files, without a model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks import BENCHMARKS, Benchmark, Question
from eval.digests import file_digest
from eval.judge import describe_judge, judge_all
from eval.questions import check_ids
from eval.results import without_garbage_collection
from eval.scoring import make_report, score_all, write_results
from mmdora.core.config import EvaluationConfig, JudgeConfig
from mmdora.core.config_files import make_folder
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)


@without_garbage_collection()
def score_predictions(
    benchmark: str,
    predictions: Path,
    annotations: str,
    split: str | None = None,
    out: Path | None = None,
    judge: JudgeConfig | None = None,
) -> dict[str, Any]:
    """Score a file or folder of predictions, in the benchmark's official format or mmdora's, and return the report.

    With `out`, the result directory is written there. A judge needs `out` for its verdicts. Raises UserError.
    """
    scorer = BENCHMARKS[benchmark]()
    config = EvaluationConfig(name=benchmark, benchmark=benchmark, data=annotations, split=split)
    scorer.check_settings(config)
    questions = check_ids(scorer.questions(config), config)
    responses = read_predictions(predictions, scorer, questions)
    if not all(q.references for q in questions):
        raise UserError(f"{annotations}: the reference answers of this split are not public, so it cannot be scored")
    scores = score_all(benchmark, responses, questions)
    receipt: dict[str, Any] = {"data": annotations, "split": split, "predictions": str(predictions)}
    receipt["file"] = file_digest(predictions)
    judged = None
    if out is not None:
        make_folder(out, "--out")
        if judge is not None:
            receipt["judge"] = describe_judge(scorer, judge)
            judged = judge_all(scorer, judge, responses, questions, out)
    report = make_report(config, responses, questions, scores, receipt, judged)
    if out is not None:
        write_results(out, responses, questions, scores, report, judged)
    return report


def read_predictions(path: Path, benchmark: Benchmark, questions: Sequence[Question]) -> dict[str, str]:
    """Return the prediction of every question by id.

    Raises UserError that names ids which are duplicate, unknown or missing. Where the official scorer counts a missing
    prediction as wrong, it is empty and a warning is logged.
    """
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: no such file")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    pairs = benchmark.read_predictions(path, questions)
    predictions, known = dict(pairs), {q.id for q in questions}
    problems = {
        "answered twice": [i for i, count in Counter(i for i, _ in pairs).items() if count > 1],
        "unknown": [i for i in predictions if i not in known],
    }
    missing = [q.id for q in questions if q.id not in predictions]
    if not benchmark.missing_is_wrong:
        problems["without an answer"] = missing
    listed = [
        f"{len(ids)} {problem}: {', '.join(ids[:5])}{' …' if len(ids) > 5 else ''}"
        for problem, ids in problems.items()
        if ids
    ]
    if listed:
        raise UserError(f"{path}: ids {'; '.join(listed)}")
    if missing:
        log.warning("%s: %d questions without an answer count as wrong, e.g. %s", path, len(missing), missing[0])
    return predictions | dict.fromkeys(missing, "")
