"""The arguments of `mmdora eval`, resolved against the run's config. Nothing here imports torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from eval.benchmarks import BENCHMARKS
from mmdora.apps.check_config import check_entries
from mmdora.apps.check_paths import check_target
from mmdora.core.config import EvaluationConfig, JudgeConfig, RunConfig
from mmdora.core.config_files import parse_section
from mmdora.core.errors import UserError
from mmdora.core.registry import nearest
from mmdora.core.run_directory import RunDir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The arguments of `mmdora eval`."""

    target: str
    only: str | None = None
    benchmark: str | None = None
    data: str | None = None
    format: str | None = None
    split: str | None = None
    prompt: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    out: Path | None = None
    overwrite: bool = False
    judge: JudgeConfig | None = None

    @cached_property
    def run_config(self) -> RunConfig | None:
        """The config of the target if it is a run."""
        run_dir = RunDir(Path(self.target))
        return run_dir.config() if run_dir.config_file.is_file() else None

    @cached_property
    def entries(self) -> list[EvaluationConfig]:
        """The `evaluation` entries to run, with the command line's changes. Raises UserError."""
        return [as_requested(entry, self) for entry in _choose(self)]

    @property
    def results(self) -> Path:
        """The folder that holds one result directory per entry. Raises UserError if the request names none."""
        if self.out is not None:
            return self.out
        if self.run_config is None:
            raise UserError(f"{self.target} is not a run; give --out DIR for the results")
        return Path(self.target) / "eval"

    @property
    def compares_features(self) -> bool:
        """Whether the benchmark compares features of a dual encoder instead of generated answers."""
        return self.benchmark is not None and BENCHMARKS[self.benchmark].compares_features

    def check(self) -> None:
        """Check the request before torch is imported. Raises UserError."""
        check_entries(self.entries)
        _ = self.results
        if not self.compares_features:
            check_target(self.target)


def _choose(request: Request) -> list[EvaluationConfig]:
    config = request.run_config
    if request.benchmark is not None:
        if request.data is None:
            raise UserError("--benchmark needs --data, the file or folder with its questions")
        name = request.only or request.benchmark
        entry = {"name": name, "benchmark": request.benchmark, "data": request.data}
        return [parse_section(EvaluationConfig, entry, "the command line")]
    if config is None:
        raise UserError(f"{request.target} is not a run; give --benchmark NAME --data DIR --out DIR")
    names = [entry.name for entry in config.evaluation]
    if request.only is not None and request.only not in names:
        raise UserError(
            f"--only {request.only}: the run has no such entry.{nearest(request.only, names)} "
            f"Entries: {', '.join(names) or 'none'}"
        )
    entries = [e for e in config.evaluation if request.only in (None, e.name)]
    if not entries:
        raise UserError(f"{request.target}: its config has no `evaluation`; give --benchmark NAME --data DIR")
    return entries


def as_requested(entry: EvaluationConfig, request: Request) -> EvaluationConfig:
    """Return the entry with the command line's changes.

    A run may come from elsewhere, so the judge address in its config receives no answers and no key unless the command
    line gives it again.
    """
    changes = {key: getattr(request, key) for key in ("format", "split", "prompt", "limit", "batch_size", "judge")}
    changes = {key: value for key, value in changes.items() if value is not None}
    if request.judge is None and entry.judge is not None and entry.judge.url is not None:
        log.warning("%s: the judge at %s is not called unless --judge-url gives it again", entry.name, entry.judge.url)
        changes["judge"] = None
    return parse_section(EvaluationConfig, entry.model_dump() | changes, "the command line")
