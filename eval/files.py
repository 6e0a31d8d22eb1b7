"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(out: Path, data: bytes | str) -> None:
    """Write a file aside, and then put it in its place."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(utf8(data) if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def utf8(text: str) -> bytes:
    """Half of a surrogate pair, as a model's answer may hold, is no UTF-8: it is written as JSON's escape."""
    return text.encode("utf-8", errors="backslashreplace")


def json_text(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False) + "\n"
