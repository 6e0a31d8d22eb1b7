"""Checks that a path can be opened as an image or a video: a regular file that is not empty."""

from __future__ import annotations

import stat
from pathlib import Path

from data_pipelines.samples import MediaError


def check_regular(path: Path) -> None:
    """Raise MediaError if a path is missing, empty, a directory, a device or a pipe. The last two could block
    forever."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(path, "no such file") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name that is too long or has a null byte
        raise MediaError(path, f"cannot be opened ({error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(path, "is a directory, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(path, "is not a regular file")
    if status.st_size == 0:
        raise MediaError(path, "the file is empty")


def is_directory(path: Path) -> bool:
    """Return whether `path` is a directory. False if that cannot be determined; `check_regular` then raises the
    reason."""
    try:
        return path.is_dir()
    except OSError:
        return False
