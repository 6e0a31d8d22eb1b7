"""Where a run's figures go besides the terminal: metrics.jsonl, Weights & Biases, TensorBoard. Rank 0 alone reports."""

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

# What `training.report_to` may name → the module that it needs, and how to get it.
NEEDED = {
    "wandb": ("wandb", "pip install wandb"),
    "tensorboard": ("tensorboard", "pip install 'mmdora[tensorboard]'"),
}


@dataclass(frozen=True)
class Prediction:
    """One answer of the model, as people look at it."""

    question: str
    references: str
    prediction: str
    score: float  # 0 to 1
    picture: PILImage.Image | None  # its frames beside one another


class Report:
    """Somewhere that a run's figures go. `line` gets what metrics.jsonl holds, a step's or an evaluation's."""

    def line(self, line: Mapping[str, Any]) -> None: ...
    def predictions(self, step: int, name: str, rows: Sequence[Prediction]) -> None: ...
    def adapter(self, folder: Path) -> None: ...
    def close(self, failed: bool) -> None: ...


class MetricsFile(Report):
    """`metrics.jsonl`: a line a step, and a line an evaluation (`{"step": …, "eval": {…}}`)."""

    def __init__(self, path: Path):
        self.path = path

    def line(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`, which a run that goes on from there does again, and a torn line."""
        if not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        aside = self.path.with_name(".metrics.jsonl")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        aside.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a killed process left unfinished is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def curves(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by flat names: `loss`, `learning_rates/vision`, `eval/loss`."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in value.items() if number is not None}
        elif isinstance(value, (int, float)) and key != "step":
            flat[key] = value
    return flat


class Wandb(Report):
    """A Weights & Biases run: the config, curves, a table of sample predictions, and the adapter as an artifact.

    Files are in the run directory, the run's id too (`wandb/id`): a training that is resumed goes on in the same run.
    Without a login W&B records offline, where it would otherwise ask on the terminal.
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
        table = self.wandb.Table(columns=["step", "question", "answer", "prediction", "score", "picture"])
        for row in rows:
            picture = self.wandb.Image(row.picture) if row.picture is not None else None
            table.add_data(step, row.question, row.references, row.prediction, row.score, picture)
        self.run.log({f"predictions/{name}": table, "step": step})

    def adapter(self, folder: Path) -> None:
        name = re.sub(r"[^\w.-]", "-", f"{self.run.name or self.run.id}-adapter")
        artifact = self.wandb.Artifact(name, type="adapter")
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def has_login(wandb: Any) -> bool:
    """Whether W&B knows who is here; it is not asked of its server."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False, verify=False)
    return bool(wandb.api.api_key)  # older versions


class TensorBoard(Report):
    """Event files in the run's `tensorboard` folder, with metrics.jsonl's names."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def line(self, line: Mapping[str, Any]) -> None:
        for name, value in curves(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self, failed: bool) -> None:
        self.writer.close()


def check_reports(config: RunConfig) -> None:
    """Raise UserError where `training.report_to` names what is not installed."""
    for name in config.training.report_to:
        module, how = NEEDED[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"training.report_to: {name} is not installed; {how}, or leave it out")


class Reports(Report):
    """All of a run's reports, of which there are none in processes other than rank 0."""

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
    """The reports that a run asks for, open while it runs; W&B hears whether it failed."""
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
