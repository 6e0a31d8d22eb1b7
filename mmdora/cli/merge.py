"""`mmdora merge`."""

from __future__ import annotations

from mmdora.apps.merge import run

__all__ = ["run"]
