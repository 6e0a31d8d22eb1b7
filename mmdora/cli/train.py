"""`mmdora train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdora.cli.app import Config, Overrides, app


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move an existing run aside.")] = False,
) -> None:
    """Fine-tune a model and evaluate it before and after.

    The config names the model, the method of each of its parts, the data and the benchmarks.
    """
    from mmdora.core.config_files import load_config
    from mmdora.core.distributed import world_size
    from mmdora.core.logs import logged
    from mmdora.core.registry import import_plugins
    from mmdora.core.run_directory import RunDir
    from mmdora.core.run_start import RunStart

    settings = load_config(config, overrides)

    from mmdora.apps.check_config import check_config

    with logged() as logs:
        import_plugins(settings.plugins)
        check_config(settings)

        from mmdora.training.reporting import check_reports

        check_reports(settings)

        if world_size() == 1:  # several processes check together, once they can communicate
            RunStart(RunDir(Path(settings.training.output)), settings, resume, overwrite, logs).check()

        from mmdora.apps.train import train as run_training
        from mmdora.core.console import make_console

        run_training(settings, resume, overwrite, make_console(), logs)
