"""Gradient checkpointing, enabled as the Trainer enables it, changes neither the loss nor the gradients.

Every block with a gradient is computed again in the backward pass.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import mmdora
from data_pipelines.collator import Collator
from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Video
from mmdora.core.config import VideoConfig
from mmdora.models.architectures import Region, architecture_of, unused_blocks
from mmdora.models.blocks import blocks_of
from tests.families import FAMILIES
from tests.media import write_image, write_video
from tests.test_composed import TOWERS, batches, compose
from tests.test_families import DORA, build, sample
from tests.tiny_models import write_language_model

Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpointing")
    write_language_model(path / "llama", "llama")
    write_image(path / "picture.png")
    write_video(path / "clip.mp4")
    return path


def blocks_with_gradients(model: nn.Module) -> dict[str, list[str]]:
    """The blocks of each tower by part, without those whose output is not used, which have no backward pass."""
    found = {}
    for part in ("vision", "language"):
        region = architecture_of(model).resolve(model)[part]
        blocks = [b for root in region.roots for b in blocks_of(model, Region((root,), region.without))]
        found[part] = [b for b in blocks if b not in unused_blocks(model, region)]
    return found


def step(model: nn.Module, samples: list[Batch], blocks: list[str]) -> tuple[Counter, list[float], Batch]:
    """Return how often each block computed, the losses, and the gradients of one pass over the samples.

    A block is counted by the first layer that it calls. The block's own hooks do not work: transformers checkpoints its
    `forward` without them, and a recomputation stops as soon as all needed tensors exist.
    """
    calls: Counter[str] = Counter()
    first: dict[str, nn.Module] = {}

    def hook(block: str):
        def count(module: nn.Module, *_) -> None:
            calls[block] += first.setdefault(block, module) is module

        return count

    leaves = [(b, m) for b in blocks for m in model.get_submodule(b).modules() if not list(m.children())]
    hooks = [leaf.register_forward_hook(hook(block)) for block, leaf in leaves]
    model.zero_grad()
    losses = []
    for batch in samples:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    for handle in hooks:
        handle.remove()
    return calls, losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check(model: nn.Module, samples: list[Batch], projector: dict | None = None) -> None:
    """Check that with DoRA in every part, checkpointing doubles the calls of each block and changes nothing else."""
    mmdora.inject_adapters(model, {"vision": DORA, "projector": projector or DORA, "language": DORA})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05)  # with B = 0, A would have no gradient
    model.train()
    blocks = blocks_with_gradients(model)
    all_blocks = [b for paths in blocks.values() for b in paths]
    assert all(len(paths) > 1 for paths in blocks.values())
    calls, losses, gradients = step(model, samples, all_blocks)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, same_losses, same_gradients = step(model, samples, all_blocks)
    assert all(calls[block] for block in all_blocks)
    assert again == {block: 2 * calls[block] for block in all_blocks}
    assert same_losses == pytest.approx(losses, rel=1e-6)
    assert same_gradients.keys() == gradients.keys()
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_of_a_composed_model(tower, folder):
    model, processor = compose(folder, tower, vision_feature_layer=-1)  # with gradients in the last block too
    check(model, batches(folder, processor))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, folder):
    model, processor = build(name)
    parts = {"image": Image(folder / "picture.png"), "video": Video(folder / "clip.mp4")}
    encoder = Encoder(processor, VideoConfig(num_frames=4))
    rows = [encoder.encode(sample(parts[kind], "What is it?")) for kind in parts if kind in FAMILIES[name].media]
    # Gemma 3's projector is a bare parameter, which cannot have an adapter.
    check(model, [Collator(processor.tokenizer.pad_token_id)(rows)], {"method": "full"} if name == "gemma3" else None)
