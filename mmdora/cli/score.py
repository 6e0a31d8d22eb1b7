"""`mmdora score`: answers that are already there, held against a benchmark's official files; no model."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from eval.benchmarks import BENCHMARKS, Benchmark, Question
from eval.digests import file_digest
from eval.judge import describe_judge, judge_all
from eval.questions import check_ids
from eval.results import without_garbage_collection
from eval.scoring import make_report, score_all, write_results
from mmdora.apps.tables import results_table
from mmdora.core.config import EvaluationConfig, JudgeConfig
from mmdora.core.config_files import make_folder
from mmdora.core.console import make_console
from mmdora.core.errors import UserError
from mmdora.core.registry import import_plugins

log = logging.getLogger(__name__)


@without_garbage_collection()
def run(
    benchmark: str,
    predictions: Path,
    annotations: str,
    split: str | None,
    as_json: bool,
    out: Path | None,
    overwrite: bool,
    plugins: list[str],
    judge: JudgeConfig | None = None,
) -> None:
    import_plugins(plugins)
    if out is not None and (out / "report.json").exists() and not overwrite:
        raise UserError(f"{out} holds a finished result; --overwrite replaces it")
    scorer = BENCHMARKS[benchmark]()
    if judge is not None and out is None:
        raise UserError("a judge wants --out, the folder that its verdicts are kept in")
    config = EvaluationConfig(name=benchmark, benchmark=benchmark, data=annotations, split=split)
    scorer.check_settings(config)
    questions = check_ids(scorer.questions(config), config)
    responses = answers_to(questions, scorer, predictions)
    if not all(q.references for q in questions):
        raise UserError(f"{annotations}: the answers of this split are not public, so nothing can be scored")
    scores = score_all(benchmark, responses, questions)
    receipt: dict[str, Any] = {"data": annotations, "split": split, "predictions": str(predictions)}
    receipt["file"] = file_digest(predictions)
    judged = None
    if out is not None:
        make_folder(out, "--out")
    if judge is not None and out is not None:
        receipt["judge"] = describe_judge(scorer, judge)
        judged = judge_all(scorer, judge, responses, questions, out)
    report = make_report(config, responses, questions, scores, receipt, judged)
    if out is not None:
        write_results(out, responses, questions, scores, report, judged)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        return
    console = make_console()
    console.print(results_table([(report, None)]))
    for name, value in report["metrics"].items():
        console.print(f"{name}: {value}")


def answers_to(questions: list[Question], benchmark: Benchmark, predictions: Path) -> dict[str, str]:
    """Every question's answer by id. Raises UserError that names duplicate, foreign and missing ids."""
    if not predictions.is_file() and not predictions.is_dir():
        raise UserError(f"{predictions}: no such file")
    if predictions.is_file() and predictions.stat().st_size == 0:
        raise UserError(f"{predictions}: the file is empty")
    pairs = benchmark.read_predictions(predictions, questions)
    answers, asked = dict(pairs), {q.id for q in questions}
    doubled = [i for i, count in Counter(i for i, _ in pairs).items() if count > 1]
    foreign = [i for i in answers if i not in asked]
    missing = [q.id for q in questions if q.id not in answers]
    faults = []
    for ids, what in ((doubled, "answered twice"), (foreign, "of no question"), (missing, "without an answer")):
        if ids and not (ids is missing and benchmark.missing_is_wrong):
            faults.append(f"{len(ids)} {what}: {', '.join(ids[:5])}{' …' if len(ids) > 5 else ''}")
    if faults:
        raise UserError(f"{predictions}: ids {'; '.join(faults)}")
    if missing:
        log.warning("%s: %d ids without an answer count as wrong, such as %s", predictions, len(missing), missing[0])
    return answers | dict.fromkeys(missing, "")
