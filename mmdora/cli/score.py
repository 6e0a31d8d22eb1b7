"""`mmdora score`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmdora.cli.app import JsonOutput, JudgeModel, JudgeUrl, Overwrite, Plugins, Split, Verdicts, app


@app.command()
def score(
    benchmark: Annotated[str, typer.Argument(help="Name of the benchmark.")],
    predictions: Annotated[Path, typer.Option(help="Predictions in the benchmark's official format or mmdora's.")],
    annotations: Annotated[str, typer.Option(help="The benchmark's official files: their folder, or the one file.")],
    split: Split = None,
    as_json: JsonOutput = False,
    out: Annotated[Path | None, typer.Option(help="Write a result directory too.")] = None,
    overwrite: Overwrite = False,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    verdicts: Verdicts = None,
    plugin: Plugins = None,
) -> None:
    """Score existing predictions, without a model."""
    from mmdora.apps.check_config import check_scoring
    from mmdora.core.config_files import judge_config
    from mmdora.core.registry import import_plugins

    judge = judge_config(judge_url, judge_model, verdicts)
    import_plugins(plugin or [])
    check_scoring(benchmark, predictions, annotations, out, overwrite, judge is not None)

    from eval.predictions import score_predictions
    from mmdora.apps.tables import results_table
    from mmdora.core.console import make_console

    report = score_predictions(benchmark, predictions, annotations, split, out, judge)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        return
    console = make_console()
    console.print(results_table([(report, None)]))
    for name, value in report["metrics"].items():
        console.print(f"{name}: {value}")
