"""Estimate a run's memory under each engine, and find the largest micro-batch that fits."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipelines.collator import Collator
from data_pipelines.encoding import Encoder
from data_pipelines.layout import Encoded, Layout
from data_pipelines.samples import Image, Message, Sample, SampleError, Text
from data_pipelines.sources import read_source
from mmdora.core.config import RunConfig
from mmdora.core.config_files import path_exists
from mmdora.core.deepspeed import read_deepspeed_config
from mmdora.core.errors import UserError
from mmdora.planning.activations import Activations, measure
from mmdora.planning.engine_memory import (
    MemoryEstimate,
    ModelSizes,
    ParallelSetup,
    memory_with_deepspeed,
    memory_without_deepspeed,
)
from mmdora.training.chunked_loss import ChunkedLoss
from mmdora.training.packing import packed_inputs, row_length

ENGINES = ("none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme")
PROBED_SAMPLES = 32  # per source, to find the longest
PLACEHOLDER_SIZE = (1024, 768)  # pixels of the image that stands in for missing data


@dataclass(frozen=True)
class Cluster:
    gpus: int
    per_node: int
    memory: float  # bytes per GPU


def hidden_size(model: Any) -> int:
    """Return the hidden size from which transformers computes DeepSpeed's bucket sizes."""
    return int(getattr(model.config, "hidden_size", None) or model.config.get_text_config().hidden_size)


def prepare(model: Any, config: RunConfig) -> None:
    """Put the model into the state in which the trainer runs its steps."""
    model.train()
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def longest_sample(config: RunConfig, encoder: Encoder) -> Encoded:
    """Return the longest of some samples, extended to `data.max_length`; a placeholder if there is no data.

    Raises:
        UserError: there is neither data nor `data.max_length`.
    """
    max_length = config.data.max_length
    samples: list[Encoded] = []
    for source in config.data.train:
        if source.format == "shapes" or path_exists(source.path):
            samples += encoded_samples(read_source(source, config.training.seed), encoder)
    if not samples and max_length is None:
        raise UserError("plan: the data does not exist, so the length of samples is unknown; set data.max_length")
    samples = samples or [encoder.encode(placeholder_sample(encoder.text_only))]
    longest = max(samples, key=lambda encoded: encoded["input_ids"].shape[1])
    missing = (max_length or 0) - longest["input_ids"].shape[1]
    if missing <= 0:
        return longest
    per_token = [key for key in longest if key in encoder.layout.per_token]
    last = {key: longest[key][:, -1:].expand(-1, missing, *longest[key].shape[2:]) for key in per_token}
    return longest | {key: torch.cat([longest[key], tail], dim=1) for key, tail in last.items()}


def encoded_samples(source: Any, encoder: Encoder) -> list[Encoded]:
    """Encode up to `PROBED_SAMPLES` samples, evenly spaced over the source."""
    encoded = []
    count = min(PROBED_SAMPLES, len(source))
    for place in (i * len(source) // count for i in range(count)):
        try:
            encoded.append(encoder.encode(source[place]))
        except SampleError:  # `mmdora doctor` reports these
            continue
    return encoded


def placeholder_sample(text_only: bool = False) -> Sample:
    """Return a question about an image, or without one."""
    from PIL import Image as PILImage

    data = io.BytesIO()
    PILImage.new("RGB", PLACEHOLDER_SIZE).save(data, "png")
    image = () if text_only else (Image(Path("image.png"), data.getvalue()),)
    question = Message("user", (*image, Text("What is this?")))
    return Sample("placeholder", (question, Message("assistant", (Text("An image."),))), "plan")


class ActivationProfiler:
    """Measures activations by micro-batch size, each size once."""

    def __init__(self, model: Any, config: RunConfig, example: Encoded, layout: Layout):
        self.model, self.example = model, example
        self.collate = Collator(0, pack=row_length(model, config.data), layout=layout)
        self.dtype = getattr(torch, config.model.dtype)
        self.chunked_loss = ChunkedLoss(model)
        self.measured: dict[int, Activations] = {}

    def __call__(self, micro_batch_size: int) -> Activations:
        if micro_batch_size not in self.measured:
            batch = self.collate([self.example] * micro_batch_size)
            if "attention_mask" not in batch:
                batch = packed_inputs(self.model, batch)
            for key, value in batch.items():  # DeepSpeed's engine casts images to the model's dtype
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    batch[key] = value.to(self.dtype)
            with self.chunked_loss:
                self.measured[micro_batch_size] = measure(self.model, batch, lambda output: output.loss)
        return self.measured[micro_batch_size]


class Planner:
    """The memory of a run under each engine, by micro-batch size."""

    def __init__(
        self, config: RunConfig, sizes: ModelSizes, cluster: Cluster, activations: Callable[[int], Activations]
    ):
        self.config, self.sizes, self.cluster, self.activations = config, sizes, cluster, activations
        own = config.training.deepspeed
        self.trees = {name: read_deepspeed_config(name)[1] for name in (*ENGINES[1:], *([own] if own else []))}
        self.engines = ["none", *self.trees]

    def memory(self, engine: str, micro_batch_size: int) -> MemoryEstimate:
        weight_bytes = 4 if self.config.model.dtype == "float32" else 2
        setup = ParallelSetup(
            world_size=self.cluster.gpus,
            gpus_per_node=self.cluster.per_node,
            accumulation_steps=self.config.training.batch_size // (micro_batch_size * self.cluster.gpus),
            weight_bytes=weight_bytes,
            evaluates_base=any(entry.before for entry in self.config.evaluation),
        )
        activations = self.activations(micro_batch_size)
        if engine == "none":
            return memory_without_deepspeed(self.sizes, setup, activations)
        return memory_with_deepspeed(self.sizes, setup, activations, engine, self.trees[engine])

    def fits(self, memory: MemoryEstimate) -> bool:
        return memory.peak <= self.cluster.memory

    def micro_batch_sizes(self) -> list[int]:
        """Return the micro-batch sizes into which the global batch can be split."""
        share = self.config.training.batch_size // self.cluster.gpus
        return [size for size in range(1, share + 1) if share % size == 0]

    def largest(self, engine: str) -> int | None:
        """Return the largest micro-batch size that fits, by bisection, because memory grows with it."""
        sizes = self.micro_batch_sizes()
        low, high = 0, len(sizes)  # all sizes below low fit, none from high on
        while low < high:
            middle = (low + high) // 2
            if self.fits(self.memory(engine, sizes[middle])):
                low = middle + 1
            else:
                high = middle
        return sizes[low - 1] if low else None
