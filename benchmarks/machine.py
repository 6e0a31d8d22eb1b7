"""What a result names as its hardware."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """What Linux calls the CPU; elsewhere the architecture alone."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
