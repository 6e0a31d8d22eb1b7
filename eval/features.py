"""Retrieval by features: each text and each video is embedded once, kept on the disk, and compared.

A video is as similar to a text as the mean of its frames' normalised features is, CLIP4Clip's meanP (Luo et al.,
arXiv 2104.08860; ArrowLuo/CLIP4Clip, modules/modeling.py, _loose_similarity).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from data_pipelines.samples import Video
from data_pipelines.video import load_video, resolve_reader
from eval.benchmarks import Question
from eval.benchmarks.retrieval import rank_responses
from eval.digests import media_digest
from eval.dual_encoders import DualEncoder
from eval.files import write_whole
from eval.receipts import finished, receipt_of
from eval.scoring import make_report, score_all, write_results
from mmdora.core.config import EvaluationConfig, VideoConfig

FRAMES = VideoConfig(sampling="fps", fps=1.0, num_frames=12)  # CLIP4Clip's: one a second, at most 12


def evaluate_by_features(
    encoder: DualEncoder,
    config: EvaluationConfig,
    questions: Sequence[Question],
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Embed, compare, score and report into `folder`; returns the report. Question i asks with its text for its video.

    A finished result of the very same questions and model is returned as it is. Raises UserError where `folder` holds
    the result of another evaluation, unless `overwrite` says that it may go.
    """
    texts = {text_key(q.sample.messages[0].text, encoder): q.sample.messages[0].text for q in questions}
    videos = {video_key(video, encoder): video for video in map(shown, questions)}
    asked = [(text_key(q.sample.messages[0].text, encoder), video_key(shown(q), encoder)) for q in questions]
    receipt = {
        **(origin or {}),
        **receipt_of(config),
        "frames": f"{FRAMES.fps:g} a second, at most {FRAMES.num_frames}; the mean of their features (meanP)",
        "video_reader": resolve_reader(FRAMES.reader),
        "weights": encoder.weights,
    }
    receipt["questions"] = _digest([key for pair in asked for key in pair])
    if not overwrite and (report := finished(folder, config.benchmark, receipt)) is not None:
        advance(len(questions))
        return report
    (folder / "report.json").unlink(missing_ok=True)  # of answers that are replaced now
    features = Features(folder / "features")
    embed_texts(texts, encoder, features, config.batch_size)
    for _ in embed_videos(videos, encoder, features):
        advance(1)
    advance(len(questions) - len(videos))
    columns = {q.references[0]: video for q, (_, video) in zip(questions, asked, strict=True)}  # one per video
    similarity = similarities([text for text, _ in asked], columns.values(), features)
    np.save(folder / "similarity.npy", similarity)
    responses = rank_responses(similarity, questions)
    scores = score_all(config.benchmark, responses, questions)
    report = make_report(config, responses, questions, scores, receipt)
    write_results(folder, responses, questions, scores, report)
    return report


def shown(question: Question) -> Video:
    """The video that the question's text belongs to."""
    (video,) = question.sample.media()
    assert isinstance(video, Video)
    return video


class Features:
    """Normalised features by key, one file each in a folder: a run that was stopped goes on where it was, and what
    changed has another key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return self._file(key).is_file()

    def __getitem__(self, key: str) -> np.ndarray:
        return np.load(self._file(key), allow_pickle=False)

    def __setitem__(self, key: str, feature: Tensor) -> None:
        data = io.BytesIO()
        np.save(data, feature.float().cpu().numpy())
        write_whole(self._file(key), data.getvalue())

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.npy"


def text_key(sentence: str, encoder: DualEncoder) -> str:
    return _digest([encoder.weights, encoder.preprocessing, "text", sentence])


def video_key(video: Video, encoder: DualEncoder) -> str:
    how = [FRAMES.model_dump_json(exclude={"reader", "timeout"}), resolve_reader(FRAMES.reader)]
    return _digest([encoder.weights, encoder.preprocessing, "video", media_digest(video), *how])


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@torch.no_grad()
def embed_texts(sentences: Mapping[str, str], encoder: DualEncoder, features: Features, batch_size: int) -> None:
    """Put the features of sentences, by key, where they are not yet."""
    missing = [(key, sentence) for key, sentence in sentences.items() if key not in features]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        found = nn.functional.normalize(encoder.texts([sentence for _, sentence in batch]).float(), dim=-1)
        for (key, _), feature in zip(batch, found, strict=True):
            features[key] = feature


@torch.no_grad()
def embed_videos(videos: Mapping[str, Video], encoder: DualEncoder, features: Features) -> Iterator[str]:
    """Put the features of videos, by key, where they are not yet; yields each key. Raises MediaError."""
    for key, video in videos.items():
        if key not in features:
            clip = load_video(video.path, FRAMES, video.data)
            frames = encoder.images([PILImage.fromarray(frame) for frame in clip.frames]).float()
            mean = nn.functional.normalize(frames, dim=-1).mean(dim=0)
            features[key] = nn.functional.normalize(mean, dim=-1)
        yield key


def similarities(texts: Iterable[str], videos: Iterable[str], features: Features) -> np.ndarray:
    """Cosines [texts, videos] of features by their keys, in float64."""
    rows, columns = (np.stack([features[key] for key in keys]).astype(np.float64) for keys in (texts, videos))
    return rows @ columns.T
