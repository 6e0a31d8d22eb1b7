"""Write files atomically, whatever text a model produced."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(out: Path, data: bytes | str) -> None:
    """Write a file under a temporary name, then rename it, so that it never exists in part."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(utf8(data) if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def utf8(text: str) -> bytes:
    """Return the text as UTF-8, with lone surrogates, which a model's answer may hold, as JSON escapes."""
    return text.encode("utf-8", errors="backslashreplace")


def json_text(value: Any) -> str:
    """Return a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False) + "\n"
