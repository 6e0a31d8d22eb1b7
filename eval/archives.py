"""Zip files that leaderboards take."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_zip(out: Path, files: Mapping[str, Sequence[Any]]) -> None:
    """Rows by the name of their file in the zip, which is a JSON list, or JSON lines where the name ends so. The zip is
    there whole or not at all, and the same rows make the same bytes."""
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, rows in files.items():
                lines = [json.dumps(row, ensure_ascii=False) for row in rows]
                text = "".join(f"{line}\n" for line in lines) if name.endswith(".jsonl") else f"[{', '.join(lines)}]"
                archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
