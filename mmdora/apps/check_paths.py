"""Checks of targets, model directories and files, made before torch is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

HUB_ID = re.compile(r"(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)  # as huggingface_hub's validate_repo_id


def check_target(target: str) -> None:
    """Check that `target` is a finished run, an adapter directory, a model directory, or can be a hub id.

    Raises UserError.
    """
    path = Path(target)
    if (path / "config.yaml").is_file():
        if not (path / "adapter").is_dir():
            raise UserError(f"{target}: the run has no adapter yet; finish it with `mmdora train CONFIG --resume`")
        return
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except ValueError as error:
            raise UserError(f"{adapter}: not valid JSON ({error})") from error
        if not base:
            raise UserError(f"{target}: its adapter_config.json does not name the base model")
        return
    if problem := model_path_problem(target):
        raise UserError(f"{problem}; give a run, an adapter directory, a model directory or a hub id")


def check_new_directory(out: Path) -> None:
    """Raise UserError unless `out` is a new or an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; give a new directory")


def check_directory(folder: Path) -> None:
    """Raise UserError unless `folder` is a directory."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")


def check_model_path(option: str, name: str) -> None:
    """Raise UserError that names the option unless `name` is a model directory or can be a hub id."""
    if problem := model_path_problem(name):
        raise UserError(f"{option}: {problem}")


def check_files(paths: Iterable[Path]) -> None:
    """Raise UserError for the first path that is not a file."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file")


def model_path_problem(name: str) -> str | None:
    """Return what is wrong with a model's directory, or None for a valid one or a name that can be a hub id."""
    path = find_path(name)
    if path.is_dir():
        return None if (path / "config.json").is_file() else f"{name!r} has no config.json, so it is not a model"
    if path.exists():
        return f"{name!r} is a file, not the directory of a model"
    can_be_hub_id = HUB_ID.fullmatch(name) and "--" not in name and ".." not in name
    return None if can_be_hub_id else f"no such directory {name!r}"
