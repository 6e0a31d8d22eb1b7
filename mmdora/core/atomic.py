"""Directories that are complete or absent: written to a temporary directory, then renamed, with a checksum per file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<kind>new|old|gone)")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; it replaces `folder` at the end of the block, once it is on disk.

    If the process is killed, the old or the new folder remains, and `clear_leftovers` removes the temporary ones.
    """
    clear_leftovers(folder.parent, folder.name)
    aside = _beside(folder, "new")
    aside.mkdir(parents=True)
    try:
        yield aside
        _sync(aside)
        old = _beside(folder, "old")
        if folder.exists():
            folder.rename(old)  # if killed here, `clear_leftovers` restores it
        aside.rename(folder)
        _sync_entry(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder; a process that is killed meanwhile leaves nothing under its name."""
    gone = _beside(folder, "gone")
    folder.rename(gone)
    shutil.rmtree(gone)


def clear_leftovers(parent: Path, name: str | None = None) -> None:
    """Clean up after killed processes in `parent`, for the folder `name` or for all folders.

    Folders that belong to a running process are not touched.
    """
    for path in sorted(parent.glob(".*")) if parent.is_dir() else []:
        match = ASIDE.fullmatch(path.name)
        if match is None or name not in (None, match["name"]) or _is_alive(int(match["pid"])):
            continue
        if match["kind"] == "old" and not (parent / match["name"]).exists():
            path.rename(parent / match["name"])
        else:
            shutil.rmtree(path)


def write_manifest(folder: Path, **about: int | str) -> None:
    """Write `manifest.json`: the keys of `about`, and size and SHA-256 of every file in the folder."""
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """Return what is damaged in a folder with a manifest; None if every file is unchanged."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"it has no {MANIFEST}"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _describe(folder / name) != expected:
            return f"{name} was changed (its SHA-256 differs)"
    return None


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.{kind}")


def _is_alive(pid: int) -> bool:
    """Return whether another process has this pid. Its own pid marks an earlier process: containers reuse pids."""
    if os.name != "posix" or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Flush every file and directory entry to disk; otherwise a crash may keep a rename but lose the content."""
    for path in _files(folder):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync_entry(path)


def _sync_entry(folder: Path) -> None:
    if os.name == "posix":  # other systems cannot open a directory
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
