"""The run directory: where its files are, and what it holds."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from mmdora.core.atomic import damage
from mmdora.core.config import RunConfig
from mmdora.core.config_files import find_path, parse_config
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)

# The files that a run directory may have before its first optimizer step.
START_FILES = {"config.yaml", "skipped.jsonl", "processor", "logs", "eval", "checkpoints", "wandb", "tensorboard"}


@dataclass(frozen=True)
class RunDir:
    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The best adapter so far (`training.best`), and `best.json`, which names its step."""
        return self.path / "best"

    @property
    def processor(self) -> Path:
        return self.path / "processor"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def result(self, name: str, before: bool = False, step: int | None = None) -> Path:
        """Return the result directory of an `evaluation` entry: after training, before it, or at a training step."""
        if step is not None:
            return self.path / "eval" / "during" / f"step-{step}" / name
        return self.path / "eval" / "before" / name if before else self.path / "eval" / name

    def is_empty(self) -> bool:
        """Return whether nothing is there: no directory, or an empty one."""
        return not self.path.is_dir() or not any(self.path.iterdir())

    def has_trained(self) -> bool:
        """Return whether the directory holds more than a start that failed before its first optimizer step.

        Files that no start writes count too: they may be the user's.
        """
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if not names:
            return False
        if "config.yaml" not in names or not names <= START_FILES:
            return True
        results = {path.name for path in (self.path / "eval").glob("*")}
        return any(self.checkpoints.glob("*")) or not results <= {"before"}

    def has_base_answers(self) -> bool:
        """Return whether the base model has answered questions (`before: true`)."""
        return any(path.stat().st_size for path in self.path.glob("eval/before/*/responses*.jsonl"))

    def checkpoint(self) -> Path | None:
        """Return the newest undamaged checkpoint, or None if there is no checkpoint at all.

        Logs a warning for each damaged checkpoint that is skipped. Raises UserError if all are damaged.
        """
        faults: dict[Path, str] = {}
        for _, path in sorted(checkpoints_in(self.checkpoints).items(), reverse=True):
            fault = damage(path)
            if fault is None:
                for damaged, reason in faults.items():
                    log.warning("%s is damaged: %s. The run continues from %s", damaged, reason, path.name)
                return path
            faults[path] = fault
        if faults:
            listed = "\n".join(f"  {path}: {reason}" for path, reason in faults.items())
            raise UserError(f"every checkpoint is damaged:\n{listed}\n--overwrite moves the run aside and starts anew")
        return None

    def config(self, trust_remote_code: bool = False) -> RunConfig:
        """Return the run's config as data: plugins are not imported, and remote code needs `trust_remote_code` anew."""
        tree = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        config = parse_config(tree, str(self.config_file))
        model = config.model.model_copy(update={"trust_remote_code": trust_remote_code})
        return config.model_copy(update={"model": model, "plugins": []})


def find_adapter(name: str) -> Path:
    """Return the adapter directory of a run, or the adapter directory itself. Raises UserError."""
    path = find_path(name)
    folder = RunDir(path).adapter if RunDir(path).config_file.is_file() else path
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{name!r} is neither a finished run nor an adapter directory")
    return folder


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return all checkpoints by step, damaged ones included."""
    steps = ((path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*"))
    return {int(step): path for step, path in steps if step.isdigit()}


def check_space(path: Path, needed: int) -> None:
    """Raise UserError if the disk under `path` has less than `needed` bytes free."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"no disk space: {path} has {free / 2**20:,.0f} MiB free, and the run needs about "
            f"{needed / 2**20:,.0f} MiB; free some, lower training.keep, or give another training.output"
        )
