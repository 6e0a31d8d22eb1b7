"""`mmdora doctor`."""

from __future__ import annotations

from pathlib import Path

from mmdora.apps.check_names import check_names
from mmdora.apps.doctor import examine
from mmdora.core.config_files import load_config
from mmdora.core.registry import import_plugins


def run(name: str, overrides: list[str], samples: int, html: Path | None) -> int:
    config = load_config(name, overrides)
    import_plugins(config.plugins)
    check_names(config)
    return examine(config, samples, html)
