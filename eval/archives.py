"""Zip files for leaderboard submissions."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from eval.files import utf8, write_whole
from mmdora.core.errors import UserError


def write_zip(out: Path, files: Mapping[str, str]) -> None:
    """Write texts, by file name, into a zip file. Equal texts give equal bytes.

    Raises UserError if the name of `out` does not end in ".zip".
    """
    if out.suffix != ".zip":
        raise UserError(f"{out}: the leaderboard takes a zip file, such as {out.with_suffix('.zip')}")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), utf8(text), zipfile.ZIP_DEFLATED)
    write_whole(out, data.getvalue())
