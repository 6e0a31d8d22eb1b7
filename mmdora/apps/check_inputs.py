"""Checks of what the user gave, made before torch, transformers or DeepSpeed are imported.

A command calls these first, so that a typo is reported in a second. What only a loaded model can tell (a part that it
does not have, targets that match nothing) is checked when the model is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.formats.shapes import TASKS
from data_pipelines.video import VIDEO_READERS
from eval.benchmarks import BENCHMARKS
from eval.results import find_results
from mmdora.adapters.methods.base import part_problems
from mmdora.core.config import EvaluationConfig, ModelConfig, RunConfig, SourceConfig
from mmdora.core.config_files import find_path, path_exists
from mmdora.core.deepspeed import read_deepspeed_config
from mmdora.core.errors import UserError
from mmdora.core.registry import Registry
from mmdora.core.run_directory import RunDir
from mmdora.core.vision_encoders import VISION_ENCODERS

HUB_ID = re.compile(r"(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)  # as huggingface_hub's validate_repo_id
HUB_TOWERS = ("clip", "dinov2", "siglip", "siglip2")  # vision encoders whose `name` is a hub id or a directory
GENERATED = [f"{task}_{split}.json" for task in TASKS for split in ("train", "held_out")]  # files of the shapes dataset


def check_config(config: RunConfig, needs_data: bool = True) -> None:
    """Check every name, path and method setting of a config. Import its plugins before.

    `needs_data`: whether data files must exist. Raises UserError that lists every problem.
    """
    problems = _model_problems(config.model)
    for part, options in config.parts.items():
        problems += part_problems(part, options)
    for name in ("train", "validation"):
        for i, source in enumerate(getattr(config.data, name)):
            problems += _source_problems(f"data.{name}.{i}", source, needs_data)
    if config.data.video.reader != "auto":
        problems += _name_problems("data.video.reader", VIDEO_READERS, config.data.video.reader)
    if config.training.deepspeed is not None:
        try:
            read_deepspeed_config(config.training.deepspeed)
        except UserError as error:
            problems.append(str(error))
    for i, entry in enumerate(config.evaluation):
        problems += _entry_problems(f"evaluation.{i}", entry, needs_data)
    if problems:
        raise UserError("the config is not valid:\n" + "\n".join(f"  {problem}" for problem in problems))


def check_entries(entries: Sequence[EvaluationConfig]) -> None:
    """Check the benchmarks that `mmdora eval` runs, as far as that needs neither a model nor their questions.

    Raises UserError.
    """
    for entry in entries:
        benchmark = BENCHMARKS[entry.benchmark]()
        benchmark.check_settings(entry)
        for problem in _entry_problems(entry.name, entry, needs_data=True):
            raise UserError(problem + (f"; expected layout:\n{benchmark.layout}" if benchmark.layout else ""))
        if missing := benchmark.missing_input(entry):
            raise UserError(missing)


def check_scoring(
    benchmark: str, predictions: Path, annotations: str, out: Path | None, overwrite: bool, judge: bool
) -> None:
    """Check the arguments of `mmdora score`. Raises UserError."""
    layout = BENCHMARKS[benchmark].layout
    if out is not None and (out / "report.json").exists() and not overwrite:
        raise UserError(f"{out} holds a finished result; --overwrite replaces it")
    if judge and out is None:
        raise UserError("a judge needs --out, the folder that its verdicts are written to")
    if not predictions.exists():
        raise UserError(f"--predictions: no such file {str(predictions)!r}")
    if not path_exists(annotations):
        expected = f"; expected layout:\n{layout}" if layout else ""
        raise UserError(f"--annotations: no such file {annotations!r}{expected}")


def check_target(target: str) -> None:
    """Check that `target` is a finished run, an adapter directory, a model directory, or can be a hub id.

    Raises UserError.
    """
    run = RunDir(Path(target))
    if run.config_file.is_file():
        if not run.adapter.is_dir():
            raise UserError(f"{target}: the run has no adapter yet; finish it with `mmdora train CONFIG --resume`")
        return
    adapter = run.path / "adapter_config.json"
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


def check_results(paths: Iterable[Path]) -> None:
    """Raise UserError for the first path that is not a result, a run with results, or a folder of results."""
    for path in paths:
        find_results(path)


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


def _model_problems(config: ModelConfig) -> list[str]:
    problems = []
    paths = {"model.path": config.path}
    if config.language_model is not None:
        paths["model.language_model.path"] = config.language_model.path
    if (encoder := config.vision_encoder) is not None:
        problems += _name_problems("model.vision_encoder.type", VISION_ENCODERS, encoder.type)
        if encoder.type in HUB_TOWERS and encoder.model_config_ is None:
            paths["model.vision_encoder.name"] = encoder.name
    for key, name in paths.items():
        if name is not None and (problem := model_path_problem(name)):
            problems.append(f"{key}: {problem}")
    if config.chat_template is not None and not find_path(config.chat_template).is_file():
        problems.append(f"model.chat_template: no such file {config.chat_template!r}")
    return problems


def _source_problems(key: str, source: SourceConfig, needs_data: bool) -> list[str]:
    problems = _name_problems(f"{key}.format", DATASET_FORMATS, source.format)
    if not needs_data:
        return problems
    problems += _data_problems(f"{key}.path", source.path, source.format)
    return problems + _folder_problems(f"{key}.media", source.media)


def _entry_problems(key: str, entry: EvaluationConfig, needs_data: bool) -> list[str]:
    problems = _name_problems(f"{key}.benchmark", BENCHMARKS, entry.benchmark)
    problems += _name_problems(f"{key}.format", DATASET_FORMATS, entry.format)
    if not needs_data:
        return problems
    problems += _data_problems(f"{key}.data", entry.data, entry.format)
    return problems + _folder_problems(f"{key}.media", entry.media)


def _data_problems(key: str, path: str, data_format: str | None) -> list[str]:
    if path_exists(path) or (data_format == "shapes" and Path(path).name in GENERATED):
        return []
    known = f"; the shapes dataset has {', '.join(GENERATED)}" if data_format == "shapes" else ""
    return [f"{key}: no such file {path!r}{known}"]


def _folder_problems(key: str, folder: str | None) -> list[str]:
    if folder is None or find_path(folder).is_dir():
        return []
    return [f"{key}: no such folder {folder!r}"]


def _name_problems(key: str, registry: Registry[Any], name: str | None) -> list[str]:
    try:
        if name is not None:
            registry.check(name)
    except UserError as error:
        return [f"{key}: {error}"]
    return []
