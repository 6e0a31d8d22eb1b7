"""Report metrics to metrics.jsonl, Weights & Biases and TensorBoard. Only rank 0 reports."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from mmdora.core.config import RunConfig
from mmdora.core.errors import UserError

# A name in `training.report_to` -> the module that it needs, and how to install it.
REQUIRED = {
    "wandb": ("wandb", "pip install wandb"),
    "tensorboard": ("tensorboard", "pip install tensorboard"),
}


@dataclass(frozen=True)
class Prediction:
    """One answer of the model, for a report."""

    question: str
    references: str
    prediction: str
    score: float  # 0 to 1
    image: PILImage.Image | None  # images and frames side by side


class Report:
    """A destination of a run's metrics. `line` gets a line of metrics.jsonl, of a step or of an evaluation."""

    def line(self, line: Mapping[str, Any]) -> None: ...
    def predictions(self, step: int, name: str, rows: Sequence[Prediction]) -> None: ...
    def adapter(self, folder: Path) -> None: ...
    def close(self, failed: bool) -> None: ...


class MetricsFile(Report):
    """`metrics.jsonl`: one line per step, and one per evaluation (`{"step": ..., "eval": {...}}`)."""

    def __init__(self, path: Path):
        self.path = path

    def line(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Remove lines after `step`, which a resumed run writes again, and an incomplete last line."""
        if not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        aside = self.path.with_name(".metrics.jsonl")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        aside.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl without an incomplete last line of a killed process."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def curves(line: Mapping[str, Any]) -> dict[str, float]:
    """Flatten a line of metrics.jsonl: `loss`, `learning_rates/vision`, `eval/loss`."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in value.items() if number is not None}
        elif isinstance(value, (int, float)) and key != "step":
            flat[key] = value
    return flat


class Wandb(Report):
    """A Weights & Biases run: config, curves, a table of sample predictions, and the adapter as an artifact.

    Its files are in the run directory. `wandb/id` holds the run's id, so a resumed training continues the same W&B run.
    Without a login W&B records offline instead of prompting on the terminal.
    """

    def __init__(self, config: RunConfig, folder: Path):
        import wandb

        self.wandb = wandb
        identity = folder / "wandb" / "id"
        identity.parent.mkdir(exist_ok=True)
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        offline = "WANDB_MODE" not in os.environ and not has_login(wandb)
        self.run = wandb.init(
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "mmdora"),
            name=folder.name,
            dir=folder,
            config=config.model_dump(mode="json", by_alias=True),
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def line(self, line: Mapping[str, Any]) -> None:
        self.run.log(curves(line) | {"step": line["step"]})

    def predictions(self, step: int, name: str, rows: Sequence[Prediction]) -> None:
        table = self.wandb.Table(columns=["step", "question", "answer", "prediction", "score", "image"])
        for row in rows:
            image = self.wandb.Image(row.image) if row.image is not None else None
            table.add_data(step, row.question, row.references, row.prediction, row.score, image)
        self.run.log({f"predictions/{name}": table, "step": step})

    def adapter(self, folder: Path) -> None:
        name = re.sub(r"[^\w.-]", "-", f"{self.run.name or self.run.id}-adapter")
        artifact = self.wandb.Artifact(name, type="adapter")
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def has_login(wandb: Any) -> bool:
    """Return whether the user is logged in to W&B, without asking the server."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False, verify=False)
    return bool(wandb.api.api_key)  # older versions of wandb


class TensorBoard(Report):
    """Event files in the run's `tensorboard` folder, named as in metrics.jsonl."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def line(self, line: Mapping[str, Any]) -> None:
        for name, value in curves(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self, failed: bool) -> None:
        self.writer.close()


def check_reports(config: RunConfig) -> None:
    """Raise UserError if a package for `training.report_to` is not installed."""
    for name in config.training.report_to:
        module, install = REQUIRED[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"training.report_to: {name} is not installed; {install}, or remove it from the list")


class Reports(Report):
    """All reports of a run; empty in processes other than rank 0."""

    def __init__(self, reports: Sequence[Report]):
        self.reports = reports

    def line(self, line: Mapping[str, Any]) -> None:
        for report in self.reports:
            report.line(line)

    def predictions(self, step: int, name: str, rows: Sequence[Prediction]) -> None:
        for report in self.reports:
            report.predictions(step, name, rows)

    def adapter(self, folder: Path) -> None:
        for report in self.reports:
            report.adapter(folder)

    def rewind(self, step: int) -> None:
        for report in self.reports:
            if isinstance(report, MetricsFile):
                report.rewind(step)


@contextmanager
def open_reports(config: RunConfig, metrics: Path, main: bool) -> Iterator[Reports]:
    """Open the run's reports for the duration of the block, and close them with its outcome."""
    reports: list[Report] = [MetricsFile(metrics)] if main else []
    failed = True
    try:
        if main and "wandb" in config.training.report_to:
            reports.append(Wandb(config, metrics.parent))
        if main and "tensorboard" in config.training.report_to:
            reports.append(TensorBoard(metrics.parent))
        yield Reports(reports)
        failed = False
    finally:
        for report in reports:
            report.close(failed)
