"""Zip files that leaderboards take."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.files import write_whole
from mmdora.errors import UserError


def write_zip(out: Path, files: Mapping[str, Sequence[Any]]) -> None:
    """Rows by the name of their file in the zip: a JSON list, or JSON lines where the name ends so. The same rows make
    the same bytes. Raises UserError for a file that is not to be called a zip file."""
    if out.suffix != ".zip":
        raise UserError(f"{out}: the leaderboard takes a zip file, as {out.with_suffix('.zip')}")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, rows in files.items():
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            text = "".join(f"{line}\n" for line in lines) if name.endswith(".jsonl") else f"[{', '.join(lines)}]"
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    write_whole(out, data.getvalue())
