"""A run directory: where its files are, how a new one begins, and how a finished one loads."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmdora.core.atomic import clear_leftovers, damage
from mmdora.core.config import ModelConfig, RunConfig, VideoConfig
from mmdora.core.config_files import dump_config, parse_config
from mmdora.core.errors import UserError

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


# What may change when a run is resumed, since the trained weights stay the same: keys, with all that is below them.
NEUTRAL = (
    "evaluation",
    "plugins",
    "model.trust_remote_code",
    "data.num_workers",
    "data.max_skipped",
    "data.max_tokens",
    "data.validation",
    "data.video.timeout",
    "training.output",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.evaluate_every",
    "training.max_bad_steps",
    "training.save_every",
    "training.keep",
    "training.on_sigterm",
    "training.deepspeed",
    "training.report_to",
)
LENGTH = ("training.epochs", "training.max_steps")


def check_resumable(begun: RunConfig, config: RunConfig, run: Path) -> None:
    """Raise UserError that names the keys with which a resumed run would not be the one that was begun.

    A run may be made longer where its learning rate does not depend on its length.
    """
    old, new = flat_keys(begun.model_dump(mode="json")), flat_keys(config.model_dump(mode="json"))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    compared = "data.validation" if begun.training.best == "loss" else "evaluation"
    neutral = [name for name in NEUTRAL if name != compared or measure(begun) == measure(config)]
    changed = [key for key in changed if not any(key == n or key.startswith(f"{n}.") for n in neutral)]
    steady = config.training.lr_scheduler == "constant" and config.training.warmup_ratio == 0
    if steady and all(old[key] is not None and new[key] is not None for key in changed if key in LENGTH):
        changed = [key for key in changed if key not in LENGTH or new[key] < old[key]]
    if changed:
        listed = "\n".join(f"  {key}: {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        longer = "; only with lr_scheduler constant and warmup_ratio 0 may a run be made longer"
        raise UserError(
            f"--resume: {run} was begun with other settings, without which it would not be the same run:\n{listed}\n"
            f"Give them as they were, or another training.output{longer if set(changed) & {*LENGTH} else ''}"
        )


def measure(config: RunConfig) -> Any:
    """By what `training.best` compares models: the best so far says nothing about a loss or a score on other data."""
    best = config.training.best
    if best == "loss":
        return config.data.validation
    return next((entry for entry in config.evaluation if entry.name == best), None)


def flat_keys(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of plain values by dotted keys, as they are given on the command line."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat_keys(value, f"{prefix}.{key}" if prefix else str(key))
    return found


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

    from mmdora.adapters.peft_format import read_adapter
    from mmdora.adapters.save_load import load_adapter
    from mmdora.models.loading import load_model

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
