"""What a number depends on, and whether a result of the very same is there already."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from eval.benchmarks import BENCHMARKS
from eval.results import read_report
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError


def receipt_of(config: EvaluationConfig) -> dict[str, Any]:
    """What every receipt tells, whatever answers the questions."""
    return {
        "data": config.data,
        "split": config.split,
        "limit": config.limit,
        "prompt_template": config.prompt or BENCHMARKS[config.benchmark].prompt,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def finished(folder: Path, benchmark: str, receipt: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report that `folder` holds, where its questions, and its judge if one is asked for, are `receipt`'s; None
    where there is no report. Raises UserError where it is that of another evaluation."""
    if not (folder / "report.json").exists():
        return None
    report = read_report(folder)
    there = report["receipt"]
    same = (report["benchmark"], there["questions"]) == (benchmark, receipt["questions"])
    if same and receipt.get("judge") in (None, there.get("judge")):
        return report
    changed = [key for key, value in receipt.items() if key != "questions" and there.get(key, value) != value]
    raise UserError(
        f"{folder} holds a finished result with other {' and '.join(changed) or 'questions'}; --overwrite replaces it, "
        "--out puts the new one elsewhere"
    )
