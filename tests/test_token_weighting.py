"""The loss of a step is the mean over all its supervised tokens, however they are split into micro-batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import mmdora
from data_pipelines.collator import Collator
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, Text
from mmdora.core.config_files import load_config
from mmdora.training import trainer as trainers
from mmdora.training.arguments import training_arguments
from mmdora.training.batches import epoch_order
from mmdora.training.trainer import AdapterTrainer
from tests.families import FAMILIES, Built
from tests.media import write_image
from tests.test_families import build

ANSWERS = ("one", "one of two " * 6, "two of one of two")


def trained(
    built: Built,
    rows: Sequence[dict[str, torch.Tensor]],
    folder: Path,
    *settings: str,
    callbacks: Any = None,
    trainer_class: type[AdapterTrainer] = AdapterTrainer,
) -> AdapterTrainer:
    """A trainer that has trained the model on `rows`."""
    model, processor = built
    common = [f"training.output={folder}", "training.save_every=null", "model.dtype=float32"]
    config = load_config("quickstart", [*common, *settings])
    mmdora.inject_adapters(model, config.parts)
    collate = Collator(processor.tokenizer.pad_token_id)
    arguments = training_arguments(config, folder)
    trainer = trainer_class(
        config, model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=callbacks
    )
    trainer.bad_steps.max_loss = math.inf  # some of the tiny models do far worse than guessing
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batches_do_not_change_the_loss(name, tmp_path):
    """Some families divide the loss by the given number of tokens, others return the mean over their own tokens."""
    image = Image(write_image(tmp_path / "image.png"))
    found = []
    for micro in (3, 1):
        model, processor = build(name)
        encoder = Encoder(processor)
        question = Message("user", (image, Text("What is it?")))
        samples = [Sample("s", (question, Message("assistant", (Text(words),))), "test") for words in ANSWERS]
        rows = [encoder.encode(sample) for sample in samples]
        assert len({int((row["labels"] != IGNORED).sum()) for row in rows}) == 3
        settings = ["training.batch_size=3", f"training.micro_batch_size={micro}", "training.max_steps=1"]
        trainer = trained((model, processor), rows, tmp_path, *settings, "parts={language: {method: dora, rank: 2}}")
        (line,) = [line for line in trainer.state.log_history if "loss" in line]
        found.append([line["loss"], line["grad_norm"]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    expected = reference(name, rows)
    assert found[0][0] == pytest.approx(expected, rel=1e-4)


def trainer_on_old_transformers(monkeypatch: pytest.MonkeyPatch) -> type[AdapterTrainer]:
    """The trainer as it is with a transformers whose Trainer always divides the loss by the micro-batches (5.17)."""
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga")
    spec = spec_from_file_location("trainer_on_old_transformers", trainers.__file__)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module.AdapterTrainer


def test_a_transformers_that_divides_the_loss_again_gives_the_same_gradient(tmp_path, monkeypatch):
    """It does so for models whose loss is the mean over the tokens that they are given."""
    grads, image = [], Image(write_image(tmp_path / "image.png"))
    for old in (False, True):
        trainer_class = trainer_on_old_transformers(monkeypatch) if old else AdapterTrainer
        model, processor = build("qwen2_5_vl")
        question = Message("user", (image, Text("What is it?")))
        samples = [Sample("s", (question, Message("assistant", (Text(words),))), "test") for words in ANSWERS]
        rows = [Encoder(processor).encode(sample) for sample in samples]
        settings = ["training.batch_size=3", "training.micro_batch_size=1", "training.max_steps=1"]
        settings += ["parts={language: {method: dora, rank: 2}}"]
        trainer = trained((model, processor), rows, tmp_path, *settings, trainer_class=trainer_class)
        grads += [line["grad_norm"] for line in trainer.state.log_history if "loss" in line]
    assert grads[1] == pytest.approx(grads[0], rel=1e-5)


class Weights(TrainerCallback):
    """Collects the projector's weight after every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(model.model.multi_modal_projector.linear_1.weight.detach().clone())


def test_a_step_without_images_moves_the_projector_by_its_momentum(tmp_path):
    """Without images, the gradient of the projector is zero, and Adam still takes a step.

    So it does with several processes, where a placeholder row adds an image.
    """
    model, processor = build("llava")
    encoder, answer = Encoder(processor), Message("assistant", (Text("one of two"),))
    image, text = Image(write_image(tmp_path / "image.png")), Text("What is it?")
    samples = [Sample("s", (Message("user", parts), answer), "test") for parts in ((image, text), (text,), (text,))]
    rows: list[Any] = [None] * 3
    for place, sample in zip(epoch_order(3, seed=0, epoch=0), samples, strict=True):
        rows[place] = encoder.encode(sample)
    settings = ["training.batch_size=1", "training.micro_batch_size=1", "training.max_steps=3", "training.seed=0"]
    settings += ["training.warmup_ratio=0", "parts={projector: {method: full}}"]
    weights = Weights()
    trainer = trained((model, processor), rows, tmp_path, *settings, callbacks=[weights])
    assert [line["grad_norm"] > 0 for line in trainer.state.log_history if "loss" in line] == [True, False, False]
    first, second, third = weights.seen
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@torch.no_grad()
def reference(name: str, rows: list[dict[str, torch.Tensor]]) -> float:
    """The mean loss over all tokens, computed from each sample separately."""
    model, _ = build(name)
    counts = [int((row["labels"][:, 1:] != IGNORED).sum()) for row in rows]
    losses = [float(model.train()(**row).loss) for row in rows]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
