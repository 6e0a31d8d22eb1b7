"""Evaluation while a run trains: the loss on `data.validation`, and `evaluation` entries with `during: true`."""

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
from mmdora.training.callbacks import RunLog
from mmdora.training.reporting import Prediction
from mmdora.training.trainer import AdapterTrainer
from mmdora.training.validation import evaluating, validation_loss

Questions = dict[str, list[Question]]  # by the name of the `evaluation` entry


@dataclass(frozen=True)
class Evaluator:
    """What the trainer calls to evaluate its model; every process calls it."""

    config: RunConfig
    run_dir: RunDir
    encoder: Encoder
    questions: Questions
    held_out: HeldOutDataset | None
    log: RunLog

    def __call__(self, trainer: AdapterTrainer) -> dict[str, float]:
        """The figures of this step by name, as `training.best` names them: `loss`, and each benchmark's official score,
        in percent. Training goes on as if nothing had been evaluated."""
        start = time.perf_counter()
        # As in training: `generate` makes pictures into features outside of the forward pass, which has it by itself.
        with evaluating(trainer.model), trainer.accelerator.autocast():
            metrics = self.loss(trainer) if self.held_out is not None else {}
            metrics |= self.scores(trainer)
        return metrics | {"seconds": round(time.perf_counter() - start, 4)}

    def loss(self, trainer: AdapterTrainer) -> dict[str, float]:
        assert self.held_out is not None
        with self.log.bar("held-out loss", len(self.held_out)) as advance:
            loss, _ = validation_loss(trainer, self.held_out, held_out_collator(self.encoder, self.held_out), advance)
        release_gathered(trainer.model_wrapped)
        return {"loss": loss}

    def scores(self, trainer: AdapterTrainer) -> dict[str, float]:
        entries = [entry for entry in self.config.evaluation if entry.during]
        if not entries:
            return {}
        step = trainer.state.global_step
        tensors, _, _ = adapter_contents(trainer.model, "default")
        origin = {"model": self.config.model.path, "adapter": f"step {step}"}
        found = {}
        for entry in entries:
            asked, folder = self.questions[entry.name], self.run_dir.result(entry.name, step=step)
            with self.log.bar(entry.name, len(asked)) as advance:
                weights = f"adapter {tensors_digest(tensors)}"  # the base stays as config.yaml names it
                report = evaluate(
                    trainer.model, self.encoder, entry, asked, folder, advance, origin, overwrite=True, weights=weights
                )
            release_gathered(trainer.model_wrapped)
            found[entry.name] = report["scores"]["official"]["value"]
            if is_main():
                rows = sample_predictions(folder, self.config.data.video)
                self.log.reports.predictions(step, entry.name, rows)
        return found


def check_scored(config: RunConfig, questions: Questions) -> None:
    """Raise UserError for an entry that is to be scored during training and has no score: its answers are not public,
    or are worth only what a judge says."""
    for i, entry in enumerate(config.evaluation):
        if not entry.during:
            continue
        if not BENCHMARKS[entry.benchmark].has_official:
            raise UserError(f"evaluation.{i}.during: {entry.benchmark} is scored by a judge alone; leave it out")
        if not all(question.references for question in questions[entry.name]):
            raise UserError(
                f"evaluation.{i}.during: the answers of {entry.benchmark}'s questions in {entry.data} are not public, "
                "so there is no score to follow; leave it out, or take another split"
            )


def held_out_collator(encoder: Encoder, dataset: HeldOutDataset) -> HeldOutCollator:
    """Under several processes each runs the vision encoder in every batch, as in training."""
    alone = world_size() == 1
    fillers = {} if alone else encoder.fillers(dataset.media_kinds())
    return HeldOutCollator(Collator(encoder.pad_token_id, fillers=fillers), encoder.blank())


def sample_predictions(folder: Path, video: VideoConfig) -> list[Prediction]:
    """Some of a result's answers, with their pictures."""
    return [
        Prediction(
            row["question"],
            " / ".join(dict.fromkeys(row["references"])),
            row["response"],
            row["official"],
            beside([picture for path in row["media"] for picture in thumbnails(Path(path), video)]),
        )
        for row in select_examples(read_scores(folder))
    ]


def beside(pictures: list[PILImage.Image]) -> PILImage.Image | None:
    """Pictures in a row, as one; None where there is none."""
    if not pictures:
        return None
    strip = PILImage.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width
    return strip
