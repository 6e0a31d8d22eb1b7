"""The loss of a step is the mean over all its supervised tokens, however they are split into micro-batches."""

from __future__ import annotations

import pytest
import torch

import mmdora
from data_pipelines.collator import Collator
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, Text
from mmdora.config_files import load_config
from mmdora.training.arguments import training_arguments
from mmdora.training.trainer import AdapterTrainer
from tests.families import FAMILIES
from tests.media import write_image
from tests.test_families import build

ANSWERS = ("one", "one of two " * 6, "two of one of two")


@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batches_do_not_change_the_loss(name, tmp_path):
    """Of every family: some take the number of tokens themselves, others give the mean of what they are handed."""
    image = Image(write_image(tmp_path / "image.png"))
    found = []
    for micro in (3, 1):
        model, processor = build(name)
        encoder = Encoder(processor)
        question = Message("user", (image, Text("What is it?")))
        samples = [Sample("s", (question, Message("assistant", (Text(words),))), "test") for words in ANSWERS]
        rows = [encoder.encode(sample) for sample in samples]
        assert len({int((row["labels"] != IGNORED).sum()) for row in rows}) == 3
        settings = [f"training.output={tmp_path}", "training.batch_size=3", f"training.micro_batch_size={micro}"]
        settings += ["training.max_steps=1", "training.save_every=null", "model.dtype=float32"]
        config = load_config("quickstart", [*settings, "parts={language: {method: dora, rank: 2}}"])
        mmdora.inject_adapters(model, config.parts)
        arguments = training_arguments(config, tmp_path)
        pad = processor.tokenizer.pad_token_id
        trainer = AdapterTrainer(config, model=model, args=arguments, train_dataset=rows, data_collator=Collator(pad))
        trainer.train()
        (line,) = [line for line in trainer.state.log_history if "loss" in line]
        found.append([line["loss"], line["grad_norm"]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    expected = reference(name, rows)
    assert found[0][0] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def reference(name: str, rows: list[dict[str, torch.Tensor]]) -> float:
    """The mean over all tokens, from each sample by itself."""
    model, _ = build(name)
    counts = [int((row["labels"][:, 1:] != IGNORED).sum()) for row in rows]
    losses = [float(model.train()(**row).loss) for row in rows]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
