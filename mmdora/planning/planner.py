"""`mmdora plan`: which engine a run fits under, on so many GPUs of so much memory, before any is paid for."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipelines.collator import Collator
from data_pipelines.dataset import read_source
from data_pipelines.encoding import PER_TOKEN, Encoded, Encoder
from data_pipelines.samples import Image, Message, Sample, SampleError, Text
from mmdora.core.config import RunConfig
from mmdora.core.config_files import path_exists, read_deepspeed
from mmdora.core.errors import UserError
from mmdora.planning.activations import Activations, measure
from mmdora.planning.engine_memory import Memory, Run, Sizes, deepspeed, plain
from mmdora.training.packing import packed_inputs, row_length

ENGINES = ("none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme")
LOOKED_AT = 32  # samples of each source, for the longest
PICTURE = (1024, 768)  # pixels, where the data is not there yet


@dataclass(frozen=True)
class Cluster:
    gpus: int
    per_node: int
    memory: float  # bytes of a GPU


def hidden_size(model: Any) -> int:
    """By which transformers sizes DeepSpeed's buckets."""
    return int(getattr(model.config, "hidden_size", None) or model.config.get_text_config().hidden_size)


def prepare(model: Any, config: RunConfig) -> None:
    """As the trainer does before its first step."""
    model.train()
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def longest(config: RunConfig, encoder: Encoder) -> Encoded:
    """The longest sample of a look at the data, or one with a picture where the data is not there; as long as
    `data.max_length` lets it be. Raises UserError where nothing says how long that is."""
    most = config.data.max_length
    found: list[Encoded] = []
    for source in config.data.train:
        if source.format == "shapes" or path_exists(source.path):
            found += encoded_samples(read_source(source, config.training.seed), encoder)
    if not found and most is None:
        raise UserError("plan: the data is not there, so nothing says how long a sample is; set data.max_length")
    example = max(found or [encoder.encode(stand_in())], key=lambda encoded: encoded["input_ids"].shape[1])
    missing = (most or 0) - example["input_ids"].shape[1]
    if missing <= 0:
        return example
    last = {key: example[key][:, -1:].expand(1, missing) for key in PER_TOKEN if key in example}
    return example | {key: torch.cat([example[key], tail], dim=1) for key, tail in last.items()}


def encoded_samples(source: Any, encoder: Encoder) -> list[Encoded]:
    found = []
    count = min(LOOKED_AT, len(source))
    for place in (i * len(source) // count for i in range(count)):
        try:
            found.append(encoder.encode(source[place]))
        except SampleError:  # `mmdora doctor` tells of these
            continue
    return found


def stand_in() -> Sample:
    """A question about a picture."""
    from PIL import Image as PILImage

    data = io.BytesIO()
    PILImage.new("RGB", PICTURE).save(data, "png")
    question = Message("user", (Image(Path("picture.png"), data.getvalue()), Text("What is this?")))
    return Sample("stand-in", (question, Message("assistant", (Text("A picture."),))), "plan")


class ActivationMeter:
    """Activations by the size of the micro-batch; each is measured once."""

    def __init__(self, model: Any, config: RunConfig, example: Encoded):
        self.model, self.example = model, example
        self.collate = Collator(0, pack=row_length(model, config.data))
        self.dtype = getattr(torch, config.model.dtype)
        self.measured: dict[int, Activations] = {}

    def __call__(self, micro: int) -> Activations:
        if micro not in self.measured:
            batch = self.collate([self.example] * micro)
            if "attention_mask" not in batch:
                batch = packed_inputs(self.model, batch)
            for key, value in batch.items():  # DeepSpeed's engine gets pictures in the model's dtype
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    batch[key] = value.to(self.dtype)
            self.measured[micro] = measure(self.model, batch, lambda output: output.loss)
        return self.measured[micro]


class Planner:
    """The memory of a run under each engine, by the size of its micro-batch."""

    def __init__(self, config: RunConfig, sizes: Sizes, cluster: Cluster, meter: Callable[[int], Activations]):
        self.config, self.sizes, self.cluster, self.meter = config, sizes, cluster, meter
        own = config.training.deepspeed
        self.trees = {name: read_deepspeed(name)[1] for name in (*ENGINES[1:], *([own] if own else []))}
        self.engines = ["none", *self.trees]

    def memory(self, engine: str, micro: int) -> Memory:
        """Measured at this micro-batch."""
        accumulation = self.config.training.batch_size // (micro * self.cluster.gpus)
        weight = 4 if self.config.model.dtype == "float32" else 2
        before = any(entry.before for entry in self.config.evaluation)
        run = Run(self.cluster.gpus, self.cluster.per_node, accumulation, weight, before)
        if engine == "none":
            return plain(self.sizes, run, self.meter(micro))
        return deepspeed(self.sizes, run, self.meter(micro), engine, self.trees[engine])

    def fits(self, memory: Memory) -> bool:
        return memory.peak <= self.cluster.memory

    def micros(self) -> list[int]:
        """The sizes of a micro-batch that the global batch can be split into."""
        share = self.config.training.batch_size // self.cluster.gpus
        return [micro for micro in range(1, share + 1) if share % micro == 0]

    def largest(self, engine: str) -> int | None:
        """The largest micro-batch that fits; found by halves, since memory grows with it."""
        micros = self.micros()
        low, high = 0, len(micros)  # all below low fit, none from high on
        while low < high:
            middle = (low + high) // 2
            if self.fits(self.memory(engine, micros[middle])):
                low = middle + 1
            else:
                high = middle
        return micros[low - 1] if low else None
