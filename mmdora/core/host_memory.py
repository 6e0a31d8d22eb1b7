"""The memory of this machine that is still available."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # a container sees its own limits here (cgroup v2)


def available_memory() -> int:
    """Return the bytes of host memory that can still be used, within the limit of this container if it has one."""
    available = int(psutil.virtual_memory().available)
    limit, used, stat = (CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not (limit.is_file() and used.is_file() and stat.is_file()):
        return available
    maximum = limit.read_text(encoding="utf-8").strip()
    if maximum == "max":
        return available
    counts = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
    # The kernel frees cached files before it ends a process.
    left = int(maximum) - int(used.read_text(encoding="utf-8")) + int(counts.get("inactive_file", 0))
    return max(0, min(available, left))
