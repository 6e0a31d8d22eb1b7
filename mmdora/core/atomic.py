"""Directories that are there whole or not at all: written aside and renamed, with a checksum of every file."""

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
    """A folder beside `folder` to write into; it takes the place of `folder` once all of it is on the disk.

    A process that is killed leaves the old folder or the new one, and beside it what `clear_leftovers` clears.
    """
    clear_leftovers(folder.parent, folder.name)
    aside = _beside(folder, "new")
    aside.mkdir(parents=True)
    try:
        yield aside
        _sync(aside)
        old = _beside(folder, "old")
        if folder.exists():
            folder.rename(old)  # killed here, `clear_leftovers` puts it back
        aside.rename(folder)
        _sync_entry(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder so that a process which is killed in the midst leaves nothing under its name."""
    gone = _beside(folder, "gone")
    folder.rename(gone)
    shutil.rmtree(gone)


def clear_leftovers(parent: Path, name: str | None = None) -> None:
    """Put right what processes that were killed left in `parent`: of the folder `name`, or of all.

    What a process that still runs is writing is left alone.
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
    """Write `manifest.json`: what the folder is (`about`), and size and SHA-256 of every file in it."""
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, in words; None where every file is what it was."""
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
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.{kind}")


def _is_alive(pid: int) -> bool:
    """Whether another process has the number. This one's own is that of an earlier one: in a container they recur."""
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
    """Have the disk hold every file and entry: a rename may otherwise outlive what it names."""
    for path in _files(folder):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync_entry(path)


def _sync_entry(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
