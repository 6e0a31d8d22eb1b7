"""What may be opened as a picture or a video: a regular file with something in it."""

from __future__ import annotations

import stat
from pathlib import Path

from data_pipelines.samples import MediaError


def check_regular(path: Path) -> None:
    """Raises MediaError for a path that is missing, empty, or a directory, device or pipe, which could block for
    ever."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(path, "no such file") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name too long or with a zero byte
        raise MediaError(path, f"cannot be opened ({error})") from error
    if stat.S_ISDIR(found.st_mode):
        raise MediaError(path, "is a directory, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise MediaError(path, "is no regular file")
    if found.st_size == 0:
        raise MediaError(path, "the file is empty")


def is_directory(path: Path) -> bool:
    """Whether a directory is at `path`. A path that cannot be looked at is none; `check_regular` says why."""
    try:
        return path.is_dir()
    except OSError:
        return False
