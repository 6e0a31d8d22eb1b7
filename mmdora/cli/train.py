"""`mmdora train`."""

from __future__ import annotations

from mmdora.apps.check_names import check_names
from mmdora.apps.train import train
from mmdora.core.config_files import load_config
from mmdora.core.console import make_console
from mmdora.core.logs import logged
from mmdora.core.registry import import_plugins
from mmdora.training.reporting import check_reports


def run(name: str, overrides: list[str], resume: bool, overwrite: bool) -> None:
    config = load_config(name, overrides)
    console = make_console()
    with logged() as logs:
        import_plugins(config.plugins)
        check_names(config)
        check_reports(config)
        train(config, resume, overwrite, console, logs)
