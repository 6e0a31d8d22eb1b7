"""`mmdora eval`."""

from __future__ import annotations

from mmdora.apps.evaluate import Request
from mmdora.apps.evaluate import run as evaluate
from mmdora.core.registry import import_plugins


def run(request: Request, trust_remote_code: bool, plugins: list[str]) -> None:
    import_plugins(plugins)
    evaluate(request, trust_remote_code)
