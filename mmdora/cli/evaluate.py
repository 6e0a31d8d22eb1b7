"""`mmdora eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdora.cli.app import JudgeModel, JudgeUrl, Overwrite, Plugins, Split, Target, Trust, Verdicts, app


@app.command("eval")
def evaluate(
    target: Target,
    only: Annotated[str | None, typer.Option(help="Name of one `evaluation` entry of the run.")] = None,
    benchmark: Annotated[str | None, typer.Option(help="Benchmark to run instead of the run's own entries.")] = None,
    data: Annotated[str | None, typer.Option(help="The benchmark's data: a file or a folder.")] = None,
    data_format: Annotated[str | None, typer.Option("--format", help="Format of the data. Default: guessed.")] = None,
    split: Split = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt template with {question}. Default: the benchmark's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate only the first N questions.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions per batch.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results. Default: the run's; required without a run.")
    ] = None,
    overwrite: Overwrite = False,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    verdicts: Verdicts = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
) -> None:
    """Evaluate a run or a model on benchmarks.

    A run is evaluated on its own `evaluation` entries; --benchmark evaluates any model on any benchmark.
    """
    from mmdora.apps.evaluation_request import Request
    from mmdora.core.config_files import judge_config
    from mmdora.core.registry import import_plugins

    judge = judge_config(judge_url, judge_model, verdicts)
    import_plugins(plugin or [])
    request = Request(
        target, only, benchmark, data, data_format, split, prompt, limit, batch_size, out, overwrite, judge
    )
    request.check()

    from mmdora.apps.evaluate import run

    run(request, trust_remote_code)
