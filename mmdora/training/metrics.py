"""Throughput of a training step over all processes: tokens, samples and frames per second, MFU, data loading time."""

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
from mmdora.training.flops import FlopCosts, device_peak

PIXELS = ("pixel_values", "pixel_values_videos")  # of images, of videos


@dataclass
class BatchCounts:
    """Sizes of micro-batches, without padding and without the blank rows that a collator adds (its `fillers`).

    `frames` counts images and frames as the vision encoder takes them: each crop of an image counts.
    """

    tokens: int = 0
    supervised: int = 0  # tokens with a label, of those that follow another token
    squares: int = 0  # sum of the squared sample lengths, in tokens
    samples: int = 0
    frames: int = 0
    pixels: int = 0  # number of pixel values

    def add(self, batch: Mapping[str, Tensor], fillers: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Count one collated batch on the CPU."""
        blank: set[str] = set()
        for ids, labels in samples_of(batch):
            if bool((labels != IGNORED).any()):
                self.tokens, self.squares = self.tokens + len(ids), self.squares + len(ids) ** 2
                self.supervised += int((labels[1:] != IGNORED).sum())
                self.samples += 1
            else:  # a batch gets a filler only if it has no such media: all its pixels of that kind are the filler's
                blank |= {key for key, row in fillers.items() if torch.equal(row["input_ids"][0], ids)}
        for key in PIXELS:
            if key in batch and key not in blank:
                self.frames += frames_of(batch, key)
                self.pixels += batch[key].numel()


def samples_of(batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (input_ids, labels) of each sample without padding, from padded or packed rows."""
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        if "attention_mask" in batch:
            kept = batch["attention_mask"][row].bool()
            yield ids[kept], labels[kept]
        else:
            starts = (batch["position_ids"][row] == 0).nonzero().flatten()
            sizes = torch.diff(starts, append=starts.new_tensor([len(ids)])).tolist()
            yield from zip(ids.split(sizes), labels.split(sizes), strict=True)


def frames_of(batch: Mapping[str, Tensor], key: str) -> int:
    """Return the number of images or frames under `key`, as the vision encoder takes them."""
    grid = batch.get("video_grid_thw" if key.endswith("videos") else "image_grid_thw")
    if grid is not None:  # Qwen's families: rows of patches; a video's frames are taken in pairs
        return int(grid[:, 0].sum()) * (2 if key.endswith("videos") else 1)
    return batch[key].shape[:-3].numel()


def memory_gib(device: torch.device) -> float:
    """Return this process's peak GPU memory in GiB; on a CPU, its current resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


class ThroughputMeter:
    """Counts while a run trains; `read` returns the figures since the last `read`.

    Every process reads at the same steps. Counts are summed over processes. Memory and data loading time are the
    maximum, because the other processes wait for the slowest one.
    """

    def __init__(self, device: torch.device, costs: FlopCosts):
        self.device, self.costs, self.peak = device, costs, device_peak(device)
        self.restart()

    def restart(self) -> None:
        """Reset all counts."""
        self.waited = 0.0  # seconds of data loading
        self.paused = 0.0  # seconds that do not belong to the step, e.g. evaluation
        self.total = BatchCounts()
        self.start = time.perf_counter()

    def count(self, batches: Iterable[Mapping[str, Tensor]], fillers: Mapping[str, Mapping[str, Tensor]]) -> None:
        for batch in batches:
            self.total.add(batch, fillers)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of the block from the step's time."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def read(self) -> dict[str, float | None]:
        """Return the figures under their keys in metrics.jsonl, and reset. A collective: every process calls it."""
        total, seconds = self.total, time.perf_counter() - self.start - self.paused
        flops = self.costs.flops(total.tokens, total.supervised, total.squares, total.pixels)
        local = [total.tokens, total.samples, total.frames, flops, self.waited, memory_gib(self.device)]
        by_rank = all_gather_numbers(local, self.device)
        tokens, samples, frames, flops = by_rank[:, :4].sum(0).tolist()
        waited, memory = by_rank[:, 4:].amax(0).tolist()
        self.restart()
        mfu = flops / seconds / (self.peak * len(by_rank)) if self.peak is not None else None
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(samples / seconds, 2),
            "frames_per_second": round(frames / seconds, 2),
            "mfu": None if mfu is None else round(mfu, 4),
            "memory_gib": round(memory, 3),
            "seconds": round(seconds, 4),
            "seconds_waiting_for_data": round(min(waited, seconds), 4),
        }
