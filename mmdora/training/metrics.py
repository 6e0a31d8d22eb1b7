"""The figures of a step, of all processes: what was trained on, how fast, and how long it waited for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from data_pipelines.encoding import IGNORED
from mmdora.core.distributed import all_gather_numbers
from mmdora.training.flops import Work, device_peak

PIXELS = ("pixel_values", "pixel_values_videos")  # of pictures, of clips


@dataclass
class Counts:
    """What micro-batches held, without padding and without the blank rows that a collator adds (its `fillers`).

    `frames` are pictures and frames as the vision encoder takes them: crops of one picture count each.
    """

    tokens: int = 0
    squares: int = 0  # of the samples' lengths in tokens, added up
    samples: int = 0
    frames: int = 0
    pixels: int = 0  # values of pictures and frames

    def add(self, batch: Mapping[str, Tensor], fillers: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Count one batch of the collator's, on the CPU."""
        blank: set[str] = set()
        for ids, labels in samples_of(batch):
            if bool((labels != IGNORED).any()):
                self.tokens, self.squares = self.tokens + len(ids), self.squares + len(ids) ** 2
                self.samples += 1
            else:  # a batch gets a filler where it has no such media: what it has of them is the filler's
                blank |= {key for key, row in fillers.items() if torch.equal(row["input_ids"][0], ids)}
        for key in PIXELS:
            if key in batch and key not in blank:
                self.frames += frames_of(batch, key)
                self.pixels += batch[key].numel()


def samples_of(batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The ids and labels of each sample, without its padding: rows, or the parts of packed rows."""
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        if "attention_mask" in batch:
            kept = batch["attention_mask"][row].bool()
            yield ids[kept], labels[kept]
        else:
            starts = (batch["position_ids"][row] == 0).nonzero().flatten()
            sizes = torch.diff(starts, append=starts.new_tensor([len(ids)])).tolist()
            yield from zip(ids.split(sizes), labels.split(sizes), strict=True)


def frames_of(batch: Mapping[str, Tensor], key: str) -> int:
    """How many pictures or frames the pixels under `key` are, as the vision encoder takes them."""
    grid = batch.get("video_grid_thw" if key.endswith("videos") else "image_grid_thw")
    if grid is not None:  # Qwen's: patches in rows; a clip's frames go in pairs
        return int(grid[:, 0].sum()) * (2 if key.endswith("videos") else 1)
    return batch[key].shape[:-3].numel()


def memory_gib(device: torch.device) -> float:
    """The most that this process took of the GPU so far; on a CPU, what it takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


class Meter:
    """Counts while a run trains; `read` gives the figures since it was last read.

    Every process reads at the same steps: what they counted is added up, and of memory and waiting the most is told,
    for the others wait for that one.
    """

    def __init__(self, device: torch.device, work: Work):
        self.device, self.work, self.peak = device, work, device_peak(device)
        self.restart()

    def restart(self) -> None:
        """Forget what was counted."""
        self.waited = 0.0  # seconds without a batch to work on
        self.paused = 0.0  # seconds that are not the step's, as an evaluation's
        self.total = Counts()
        self.start = time.perf_counter()

    def count(self, batches: Iterable[Mapping[str, Tensor]], fillers: Mapping[str, Mapping[str, Tensor]]) -> None:
        for batch in batches:
            self.total.add(batch, fillers)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not slow the step that is being measured."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def read(self) -> dict[str, float | None]:
        """The figures by their names in metrics.jsonl. A collective: every process calls it."""
        total, seconds = self.total, time.perf_counter() - self.start - self.paused
        flops = self.work.flops(total.tokens, total.squares, total.pixels)
        mine = [total.tokens, total.samples, total.frames, flops, self.waited, memory_gib(self.device)]
        everyone = all_gather_numbers(mine, self.device)
        tokens, samples, frames, flops = everyone[:, :4].sum(0).tolist()
        waited, memory = everyone[:, 4:].amax(0).tolist()
        self.restart()
        mfu = flops / seconds / (self.peak * len(everyone)) if self.peak is not None else None
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(samples / seconds, 2),
            "frames_per_second": round(frames / seconds, 2),
            "mfu": None if mfu is None else round(mfu, 4),
            "memory_gib": round(memory, 3),
            "seconds": round(seconds, 4),
            "seconds_waiting_for_data": round(min(waited, seconds), 4),
        }
