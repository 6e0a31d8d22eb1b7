"""Zip files that leaderboards take."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from eval.files import utf8, write_whole


def write_zip(out: Path, files: Mapping[str, str]) -> None:
    """Texts by the name of their file in the zip. The same texts make the same bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), utf8(text), zipfile.ZIP_DEFLATED)
    write_whole(out, data.getvalue())
