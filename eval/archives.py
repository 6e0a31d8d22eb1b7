"""Zip files that leaderboards take."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from eval.files import utf8, write_whole
from mmdora.core.errors import UserError


def write_zip(out: Path, files: Mapping[str, str]) -> None:
    """Texts by the name of their file in the zip. The same texts make the same bytes. Raises UserError for a file that
    is not to be called a zip file."""
    if out.suffix != ".zip":
        raise UserError(f"{out}: the leaderboard takes a zip file, as {out.with_suffix('.zip')}")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), utf8(text), zipfile.ZIP_DEFLATED)
    write_whole(out, data.getvalue())
