"""Evaluation during training: the loss on `data.validation`, and `evaluation` entries with `during: true`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as PILImage

from data_pipelines.collator import Collator
from data_pipelines.encoding import Encoder
from data_pipelines.held_out import HeldOutCollator, HeldOutDataset
from eval.benchmarks import BENCHMARKS, Question
from eval.digests import tensors_digest
from eval.report import select_examples, thumbnails
from eval.results import read_scores
from eval.run import evaluate
from mmdora.adapters.save_load import adapter_contents
from mmdora.core.config import RunConfig, VideoConfig
from mmdora.core.deepspeed import release_gathered
from mmdora.core.distributed import is_main, world_size
from mmdora.core.errors import UserError
from mmdora.core.run_directory import RunDir
from mmdora.training.callbacks import MetricsCallback
from mmdora.training.reporting import Prediction
from mmdora.training.trainer import AdapterTrainer
from mmdora.training.validation import evaluating, validation_loss

Questions = dict[str, list[Question]]  # by the name of the `evaluation` entry


@dataclass(frozen=True)
class Evaluator:
    """The trainer calls it to evaluate its model. A collective: every process calls it."""

    config: RunConfig
    run_dir: RunDir
    encoder: Encoder
    questions: Questions
    validation: HeldOutDataset | None
    metrics: MetricsCallback

    def __call__(self, trainer: AdapterTrainer) -> dict[str, float]:
        """Return the metrics of this step by the names that `training.best` uses: `loss`, and each entry's official
        score in percent. The state of the training, random numbers included, does not change."""
        start = time.perf_counter()
        # Autocast as in training: `generate` encodes images outside the forward pass, which applies autocast itself.
        with evaluating(trainer.model), trainer.accelerator.autocast():
            metrics = self.loss(trainer) if self.validation is not None else {}
            metrics |= self.scores(trainer)
        return metrics | {"seconds": round(time.perf_counter() - start, 4)}

    def loss(self, trainer: AdapterTrainer) -> dict[str, float]:
        assert self.validation is not None
        collator = validation_collator(self.encoder, self.validation)
        with self.metrics.bar("validation loss", len(self.validation)) as advance:
            loss, _ = validation_loss(trainer, self.validation, collator, advance)
        release_gathered(trainer.model_wrapped)
        return {"loss": loss}

    def scores(self, trainer: AdapterTrainer) -> dict[str, float]:
        entries = [entry for entry in self.config.evaluation if entry.during]
        if not entries:
            return {}
        step = trainer.state.global_step
        tensors, _, _ = adapter_contents(trainer.model, "default")
        origin = {"model": self.config.model.path, "adapter": f"step {step}"}
        weights = f"adapter {tensors_digest(tensors)}"  # the base model is frozen, and config.yaml names it
        scores = {}
        for entry in entries:
            questions, folder = self.questions[entry.name], self.run_dir.result(entry.name, step=step)
            with self.metrics.bar(f"{entry.name}, step {step}", len(questions)) as advance:
                args = (entry, questions, folder, advance, origin)
                report = evaluate(
                    trainer.model,
                    self.encoder,
                    *args,
                    overwrite=True,
                    weights=weights,
                    merge_memory=self.config.model.merge_memory,
                )
            release_gathered(trainer.model_wrapped)
            scores[entry.name] = report["scores"]["official"]["value"]
            if is_main():
                predictions = sample_predictions(folder, self.config.data.video)
                self.metrics.reports.predictions(step, entry.name, predictions)
        return scores


def check_scored(config: RunConfig, questions: Questions) -> None:
    """Raise UserError for an entry with `during: true` that has no score: its answers are not public, or only a judge
    can score it."""
    for i, entry in enumerate(config.evaluation):
        if not entry.during:
            continue
        if not BENCHMARKS[entry.benchmark].has_official:
            raise UserError(f"evaluation.{i}.during: {entry.benchmark} is scored by a judge alone; leave it out")
        if not all(question.references for question in questions[entry.name]):
            raise UserError(
                f"evaluation.{i}.during: the answers to {entry.benchmark}'s questions in {entry.data} are not public, "
                "so there is no score; leave it out, or use another split"
            )


def validation_collator(encoder: Encoder, dataset: HeldOutDataset) -> HeldOutCollator:
    """Return the collator. With several processes each batch gets blank media where it has none, so that every process
    runs the vision encoder, as in training."""
    fillers = {} if world_size() == 1 else encoder.fillers(dataset.media_kinds())
    return HeldOutCollator(Collator(encoder.pad_token_id, fillers=fillers, layout=encoder.layout), encoder.blank())


def sample_predictions(folder: Path, video: VideoConfig) -> list[Prediction]:
    """Return some of a result's answers, with their images."""
    return [
        Prediction(
            row["question"],
            " / ".join(dict.fromkeys(row["references"])),
            row["response"],
            row["official"],
            side_by_side([image for path in row["media"] for image in thumbnails(Path(path), video)]),
        )
        for row in select_examples(read_scores(folder))
    ]


def side_by_side(images: list[PILImage.Image]) -> PILImage.Image | None:
    """Join images horizontally; None if there are none."""
    if not images:
        return None
    strip = PILImage.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width
    return strip
