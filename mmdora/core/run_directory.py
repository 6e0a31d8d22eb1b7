"""A run directory: where its files are, and how a new one begins."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from mmdora.core.atomic import clear_leftovers, damage
from mmdora.core.config import RunConfig
from mmdora.core.config_files import dump_config, parse_config
from mmdora.core.errors import UserError
from mmdora.core.resuming import check_resumable

log = logging.getLogger(__name__)


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
        """Where `training.best` keeps the best adapter so far, and which step it is of."""
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
        """Of an `evaluation` entry: before training, at a step of it, or after."""
        if step is not None:
            return self.path / "eval" / "during" / f"step-{step}" / name
        return self.path / "eval" / "before" / name if before else self.path / "eval" / name

    def begin(self, config: RunConfig, resume: bool, overwrite: bool) -> None:
        """Make the directory and write its config. Raises UserError where a run is there already."""
        if resume and overwrite:
            raise UserError("--resume goes on with the run that is there, --overwrite moves it aside: give one of them")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"training.output: {self.path} is a file")
        taken = self.path.is_dir() and any(self.path.iterdir())
        if taken and overwrite:
            aside = self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            self.path.rename(aside)
        elif taken and not resume:
            raise UserError(
                f"{self.path} already holds a run; --resume goes on with it, --overwrite moves it aside, "
                "or give another training.output"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"training.output: cannot make {self.path} ({error.strerror})") from error
        clear_leftovers(self.path)
        clear_leftovers(self.checkpoints)
        if self.config_file.exists():
            tree = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
            check_resumable(parse_config(tree, str(self.config_file)), config, self.path)
        aside = self.config_file.with_suffix(".new")
        aside.write_text(dump_config(config), encoding="utf-8")
        aside.replace(self.config_file)
        self.skipped.touch()

    def checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; None where there is none at all. One that is damaged is named in a
        warning. Raises UserError where all of them are."""
        faults: dict[Path, str] = {}
        for _, path in sorted(checkpoints_in(self.checkpoints).items(), reverse=True):
            fault = damage(path)
            if fault is None:
                for other, reason in faults.items():
                    log.warning("%s is damaged: %s. The run goes on from %s", other, reason, path.name)
                return path
            faults[path] = fault
        if faults:
            listed = "\n".join(f"  {path}: {reason}" for path, reason in faults.items())
            raise UserError(f"no checkpoint is whole:\n{listed}\n--overwrite moves the run aside and begins anew")
        return None

    def config(self, trust_remote_code: bool = False) -> RunConfig:
        """The run's config as data: its plugins are not imported, and remote code is trusted only if said so again."""
        tree = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        config = parse_config(tree, str(self.config_file))
        model = config.model.model_copy(update={"trust_remote_code": trust_remote_code})
        return config.model_copy(update={"model": model, "plugins": []})


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Checkpoints by their step, whole or not."""
    found = ((path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*"))
    return {int(step): path for step, path in found if step.isdigit()}


def check_space(path: Path, needed: int) -> None:
    """Raise UserError where the disk under `path` has less than `needed` bytes free."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"no disk space: {path} has {free / 2**20:,.0f} MiB free, and the run needs about "
            f"{needed / 2**20:,.0f} MiB; free some, lower training.keep, or give another training.output"
        )
