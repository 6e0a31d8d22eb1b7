"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(out: Path, data: bytes | str) -> None:
    """Write a file aside, and then put it in its place; text in UTF-8."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
