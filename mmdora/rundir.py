"""A run directory: where its files are, how a new one begins, and how a finished one loads."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmdora.config import ModelConfig, RunConfig, VideoConfig
from mmdora.config_files import dump_config, parse_config
from mmdora.errors import UserError


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
        if not resume:
            self.config_file.write_text(dump_config(config), encoding="utf-8")
            self.skipped.touch()

    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint: the Trainer writes `trainer_state.json` last."""
        found = [p.parent for p in (self.path / "checkpoints").glob("checkpoint-*/trainer_state.json")]
        return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)

    def config(self, trust_remote_code: bool = False) -> RunConfig:
        """The run's config as data: its plugins are not imported, and remote code is trusted only if said so again."""
        tree = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        config = parse_config(tree, str(self.config_file))
        model = config.model.model_copy(update={"trust_remote_code": trust_remote_code})
        return config.model_copy(update={"model": model, "plugins": []})


def check_space(path: Path, needed: int) -> None:
    """Raise UserError where the disk under `path` has less than `needed` bytes free."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"no disk space: {path} has {free / 2**20:,.0f} MiB free, and the run needs about "
            f"{needed / 2**20:,.0f} MiB; free some, lower training.keep, or give another training.output"
        )


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, from a run, an adapter directory or a plain model."""

    model: Any
    processor: Any
    video: VideoConfig
    config: RunConfig | None  # of a run


def load_target(target: str, trust_remote_code: bool = False, dtype: str | None = None) -> Loaded:
    """Load a run directory, an adapter directory (on the base that it names) or a model. Raises UserError."""
    from transformers import AutoProcessor

    from mmdora.checkpoint import load_adapter
    from mmdora.loading import load_model
    from mmdora.peft_format import read_adapter

    run = RunDir(Path(target))
    if run.config_file.is_file():
        config = run.config(trust_remote_code)
        if not run.adapter.is_dir():
            raise UserError(f"{target}: the run has no adapter yet; it did not finish (mmdora train … --resume)")
        model, _ = load_model(config.model)
        load_adapter(model, run.adapter)
        processor = AutoProcessor.from_pretrained(run.processor, trust_remote_code=trust_remote_code)
        return Loaded(on_device(model).eval(), processor, config.data.video, config)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code} | ({"dtype": dtype} if dtype else {})
    if (run.path / "adapter_config.json").is_file():
        about = json.loads((run.path / "adapter_config.json").read_text(encoding="utf-8"))
        base = about.get("base_model_name_or_path")
        if not base:
            raise UserError(f"{target}: its adapter_config.json does not name the base model")
        tokens = list(read_adapter(run.path).new_tokens)
        model, processor = load_model(ModelConfig(path=base, new_tokens=tokens, **options))
        load_adapter(model, run.path)
        return Loaded(on_device(model).eval(), processor, VideoConfig(), None)
    model, processor = load_model(ModelConfig(path=target, **options))
    return Loaded(on_device(model), processor, VideoConfig(), None)


def on_device(model: Any) -> Any:
    """The model on this process's GPU, where there is one."""
    import os

    import torch

    return model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}") if torch.cuda.is_available() else model
