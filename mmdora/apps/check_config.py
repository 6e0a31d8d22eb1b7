"""Checks of a config and of benchmark arguments, made before torch, transformers or DeepSpeed are imported.

A command calls these first, so that a typo is reported in a second. What only a loaded model can tell (a part that it
does not have, targets that match nothing) is checked when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.formats.shapes import TASKS
from data_pipelines.video import VIDEO_READERS
from eval.benchmarks import BENCHMARKS
from mmdora.adapters.methods.base import part_problems
from mmdora.apps.check_paths import model_path_problem
from mmdora.core.config import EvaluationConfig, ModelConfig, RunConfig, SourceConfig
from mmdora.core.config_files import find_path, path_exists
from mmdora.core.deepspeed import read_deepspeed_config
from mmdora.core.errors import UserError
from mmdora.core.registry import Registry
from mmdora.core.run_directory import find_adapter
from mmdora.core.vision_encoders import VISION_ENCODERS

HUB_TOWERS = ("clip", "dinov2", "siglip", "siglip2")  # vision encoders whose `name` is a hub id or a directory
GENERATED = [f"{task}_{split}.json" for task in TASKS for split in ("train", "held_out")]  # files of the shapes dataset


def check_config(config: RunConfig, needs_data: bool = True) -> None:
    """Check every name, path and method setting of a config. Import its plugins before.

    `needs_data`: whether data files must exist. Raises UserError that lists every problem.
    """
    problems = _model_problems(config.model) + _adapter_problems(config)
    for part, options in config.parts.items():
        problems += part_problems(part, options)
    for name, sources in (("train", config.data.train), ("validation", config.data.validation_sources)):
        for i, source in enumerate(sources):
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


def _adapter_problems(config: RunConfig) -> list[str]:
    problems = []
    output = Path(config.training.output).resolve()
    for key in ("adapter", "frozen_adapter"):
        name = getattr(config.model, key)
        if name is None:
            continue
        try:
            folder = find_adapter(name).resolve()
        except UserError as error:
            problems.append(f"model.{key}: {error}")
            continue
        if folder.is_relative_to(output):
            problems.append(f"model.{key}: {name!r} is in training.output; give the new run a directory of its own")
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
