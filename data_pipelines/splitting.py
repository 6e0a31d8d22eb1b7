"""Hold a share of the training data out for validation, whole images and videos at a time. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.samples import SampleError
from data_pipelines.sources import Source, read_source
from mmdora.core.config import DataConfig
from mmdora.core.errors import UserError


def read_sources(data: DataConfig, seed: int) -> tuple[list[Source], list[Source]]:
    """Open the datasets of `data.train` and `data.validation`. Raises UserError."""
    training = [read_source(source, seed) for source in data.train]
    if data.validation_share is not None:
        return split_off(training, data.validation_share, seed)
    return training, [read_source(source, seed) for source in data.validation_sources]


@dataclass
class Group:
    """Samples that belong on the same side: (source, position in it). `label` does not depend on their order."""

    label: str
    places: list[tuple[int, int]]

    def counts(self, sources: int) -> np.ndarray:
        """Return the number of its samples in each source."""
        return np.bincount([source for source, _ in self.places], minlength=sources)


def split_off(sources: Sequence[Source], share: float, seed: int) -> tuple[list[Source], list[Source]]:
    """Return the sources without about `share` (0 to 1) of their samples, and sources of these samples.

    All samples that share an image or a video are on the same side, in whichever source they are. Samples without media
    are on the same side if their texts are equal. The seed and the names of the files, relative to their media folder,
    determine the split; the order of the rows does not. Every source keeps a sample. Raises UserError if nothing can be
    split off.
    """
    sizes = np.array([len(source) for source in sources])
    wanted = max(1, round(share * int(sizes.sum())))
    groups = sorted(_groups(sources), key=lambda group: _digest(f"{seed} {group.label}"))
    held_out = _choose(groups, sizes, wanted)
    if not held_out:  # every group is larger than the share
        held_out = _choose(sorted(groups, key=lambda group: len(group.places)), sizes, int(sizes.sum()))[:1]
    if not held_out:
        raise UserError(
            "data.validation: no sample of data.train can be held out, because all samples of a source share an image "
            "or a video; give a file of validation data instead of a share"
        )
    chosen = [np.zeros(size, bool) for size in sizes]
    for group in held_out:
        for source, at in group.places:
            chosen[source][at] = True
    pairs = list(zip(sources, chosen, strict=True))
    training = [source.part(~own, with_rejected=True) for source, own in pairs]
    return training, [source.part(own) for source, own in pairs if own.any()]


def _choose(groups: Sequence[Group], sizes: np.ndarray, wanted: int) -> list[Group]:
    """Return the groups, in order, that fit into `wanted` samples together and leave every source a sample."""
    chosen, remaining = [], sizes.copy()
    for group in groups:
        counts = group.counts(len(sizes))
        if counts.sum() <= wanted and (counts < remaining).all():
            chosen.append(group)
            remaining, wanted = remaining - counts, wanted - int(counts.sum())
    return chosen


def _groups(sources: Sequence[Source]) -> list[Group]:
    """Return the samples as groups that are connected by images, videos or texts."""
    places = [(i, at) for i, source in enumerate(sources) for at in range(len(source))]
    parents, labels = list(range(len(places))), []
    first: dict[str, int] = {}  # number of the first sample with an image, a video or a text
    paths: dict[str, str] = {}  # path -> the file that it leads to

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    for number, (i, at) in enumerate(places):
        contents = _contents(sources[i], at, paths)
        labels.append(min(f"{i} {label}" for label in contents.values()))
        for identity in contents:
            parents[root(number)] = root(first.setdefault(identity, number))
    groups: dict[int, Group] = {}
    for number, place in enumerate(places):
        group = groups.setdefault(root(number), Group(labels[number], []))
        group.label = min(group.label, labels[number])
        group.places.append(place)
    return list(groups.values())


def _contents(source: Source, at: int, paths: dict[str, str]) -> dict[str, str]:
    """Return what connects a sample to others: its images and videos, or its text if it has none. The values name them
    independently of where the data lie."""
    try:
        sample = source[at]
    except SampleError as error:  # training records it in the ledger
        return {f"row {source.path} {at}": f"row {error.sample_id}"}
    contents = {}
    for part in sample.media():
        if part.data is not None:
            name = hashlib.sha256(part.data).hexdigest()
            contents[name] = name
        else:
            path = str(part.path)
            if path not in paths:
                paths[path] = os.path.realpath(path)
            contents[paths[path]] = os.path.relpath(path, source.media_folder)
    if not contents:
        text = _digest("\n".join(f"{message.role}: {message.text}" for message in sample.messages))
        contents[text] = text
    return contents


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
