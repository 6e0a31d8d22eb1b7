"""Check that data without media goes with a language model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Sample
from data_pipelines.sources import Source
from eval.benchmarks import Question
from mmdora.core.errors import UserError


def check_text_only(
    encoder: Encoder, sources: Mapping[str, Source], questions: Mapping[str, Sequence[Question]]
) -> None:
    """Raise UserError that names the first sample with an image or a video if the model is a language model alone.

    `sources` and `questions` are keyed by their settings, such as `data.train.0`.
    """
    if not encoder.text_only:
        return
    for setting, sample in _first_with_media(sources, questions):
        medium = next(sample.media())
        kind = "an image" if isinstance(medium, Image) else "a video"
        raise UserError(
            f"{setting}: sample {sample.id!r} of {sample.source} has {kind} ({medium.path}), and the model is a "
            "language model alone; remove such samples, or use an image-text-to-text model"
        )


def _first_with_media(
    sources: Mapping[str, Source], questions: Mapping[str, Sequence[Question]]
) -> Iterator[tuple[str, Sample]]:
    for setting, source in sources.items():
        for position in np.flatnonzero(source.kinds)[:1]:
            yield setting, source[int(position)]
    for setting, asked in questions.items():
        for question in asked:
            if any(question.sample.media()):
                yield setting, question.sample
                break
