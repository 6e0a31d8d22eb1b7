"""Workbooks (xlsx) for leaderboards: one sheet whose first row holds the column names."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError
from zipfile import BadZipFile

from mmdora.core.errors import UserError


def read_workbook(path: Path) -> list[dict[str, Any]]:
    """Return the first sheet, one dict per row; an empty cell is "". Raises UserError if it is not a workbook."""
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with closing(load_workbook(path, read_only=True, data_only=True)) as book:
            sheet = list(book.worksheets[0].iter_rows(values_only=True))
        names, *rows = [["" if cell is None else cell for cell in row] for row in sheet]
    except (BadZipFile, InvalidFileException, ParseError, KeyError, IndexError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a workbook with a row of column names ({error})") from None
    return [dict(zip(map(str, names), row, strict=False)) for row in rows if any(cell != "" for cell in row)]


def workbook(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the bytes of a workbook with one sheet.

    Text stays text, even if it begins with "=". Control characters, which a sheet cannot hold, are removed.
    """
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, WriteOnlyCell

    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(list(columns))
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name, "")
            cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"
            cells.append(cell)
        sheet.append(cells)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()
