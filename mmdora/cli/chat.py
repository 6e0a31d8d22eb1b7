"""`mmdora chat`."""

from __future__ import annotations

from mmdora.apps.chat import run

__all__ = ["run"]
