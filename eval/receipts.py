"""Receipts: the settings that a result depends on, by which a finished result of the same evaluation is recognised."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks import BENCHMARKS
from eval.results import read_report
from mmdora.core.config import EvaluationConfig
from mmdora.core.distributed import is_main
from mmdora.core.errors import UserError


def common_receipt(config: EvaluationConfig) -> dict[str, Any]:
    """Return the entries that every receipt of a model's evaluation has."""
    import torch
    import transformers

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


def reuse_report(
    folder: Path, benchmark: str, receipt: Mapping[str, Any], overwrite: bool = False
) -> dict[str, Any] | None:
    """Return the report in `folder` if it is of the same evaluation; otherwise clear the way for a new one.

    The evaluation is the same if the benchmark, the digest of the questions and (if one is configured) the judge are
    those of `receipt`. Without a report, or with `overwrite`, return None; rank 0 then removes the old `report.json`,
    because its answers are about to be replaced.

    Raises UserError if the folder holds the report of another evaluation.
    """
    if not overwrite and (folder / "report.json").exists():
        report = read_report(folder)
        earlier = report["receipt"]
        same = (report["benchmark"], earlier["questions"]) == (benchmark, receipt["questions"])
        if same and receipt.get("judge") in (None, earlier.get("judge")):
            return report
        changed = [key for key, value in receipt.items() if key != "questions" and earlier.get(key, value) != value]
        raise UserError(
            f"{folder} holds a finished result with other {' and '.join(changed) or 'questions'}; --overwrite replaces "
            "it, --out puts the new one elsewhere"
        )
    if is_main():
        (folder / "report.json").unlink(missing_ok=True)
    return None
