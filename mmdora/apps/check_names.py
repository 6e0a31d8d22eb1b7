"""Every name and path of a config, looked up before anything is loaded."""

from __future__ import annotations

from typing import Any

from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.video import VIDEO_READERS
from eval.benchmarks import BENCHMARKS
from mmdora.adapters import ADAPTERS
from mmdora.core.config import RunConfig
from mmdora.core.config_files import find_path, is_there
from mmdora.core.errors import UserError


def check_names(config: RunConfig) -> None:
    """Every name and path of the config, before anything is loaded. Raises UserError that lists all that are wrong."""
    problems: list[str] = []

    def check(key: str, registry: Any, name: str | None) -> None:
        try:
            _ = None if name is None else registry[name]
        except UserError as error:
            problems.append(f"{key}: {error}")

    for part, options in config.parts.items():
        check(f"parts.{part}.method", ADAPTERS, options.method)
    lists = {"train": config.data.train, "validation": config.data.validation}
    for key, source in ((f"data.{name}.{i}", source) for name, all_ in lists.items() for i, source in enumerate(all_)):
        check(f"{key}.format", DATASET_FORMATS, source.format)
        if source.format != "shapes" and not is_there(source.path):
            problems.append(f"{key}.path: no such file {source.path!r}")
        if source.media is not None and not find_path(source.media).is_dir():
            problems.append(f"{key}.media: no such folder {source.media!r}")
    if config.data.video.reader != "auto":
        check("data.video.reader", VIDEO_READERS, config.data.video.reader)
    for i, entry in enumerate(config.evaluation):
        check(f"evaluation.{i}.benchmark", BENCHMARKS, entry.benchmark)
        check(f"evaluation.{i}.format", DATASET_FORMATS, entry.format)
        if entry.format != "shapes" and not is_there(entry.data):
            problems.append(f"evaluation.{i}.data: no such file or folder {entry.data!r}")
        if entry.media is not None and not find_path(entry.media).is_dir():
            problems.append(f"evaluation.{i}.media: no such folder {entry.media!r}")
    if problems:
        raise UserError("the config names what is not there:\n" + "\n".join(f"  {p}" for p in problems))
