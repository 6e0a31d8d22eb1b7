"""Evaluate retrieval with a model that embeds texts and images: embed each text and video once, then compare.

The similarity of a text and a video is the cosine between the text's feature and the mean of the frames' normalized
features: CLIP4Clip's meanP (Luo et al., arXiv 2104.08860; ArrowLuo/CLIP4Clip, modules/modeling.py,
_loose_similarity).
"""

from __future__ import annotations

import io
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
from eval.digests import json_digest, media_digest
from eval.dual_encoders import DualEncoder
from eval.files import write_whole
from eval.receipts import common_receipt, reuse_report
from eval.scoring import score_and_write
from mmdora.core.config import EvaluationConfig, VideoConfig

FRAMES = VideoConfig(sampling="fps", fps=1.0, num_frames=12)  # as CLIP4Clip: one frame per second, at most 12


def evaluate_by_features(
    encoder: DualEncoder,
    config: EvaluationConfig,
    questions: Sequence[Question],
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Embed, compare and score; write the report into `folder` and return it. Question i's text belongs to its video.

    A finished result of the same questions and model is returned unchanged.

    Raises UserError if `folder` holds the result of another evaluation and `overwrite` is not set.
    """
    texts = {text_key(text_of(q), encoder): text_of(q) for q in questions}
    videos = {video_key(video, encoder): video for video in map(video_of, questions)}
    pairs = [(text_key(text_of(q), encoder), video_key(video_of(q), encoder)) for q in questions]
    receipt = {
        **(origin or {}),
        **common_receipt(config),
        "frames": f"{FRAMES.fps:g} per second, at most {FRAMES.num_frames}; the mean of their features (meanP)",
        "video_reader": resolve_reader(FRAMES.reader),
        "weights": encoder.weights,
        "questions": json_digest([key for pair in pairs for key in pair]),
    }
    if (report := reuse_report(folder, config.benchmark, receipt, overwrite)) is not None:
        advance(len(questions))
        return report
    features = FeatureFiles(folder / "features")
    embed_texts(texts, encoder, features, config.batch_size)
    for _ in embed_videos(videos, encoder, features):
        advance(1)
    advance(len(questions) - len(videos))  # several texts may belong to one video
    columns = {q.references[0]: video for q, (_, video) in zip(questions, pairs, strict=True)}  # one per video
    similarity = similarities([text for text, _ in pairs], columns.values(), features)
    np.save(folder / "similarity.npy", similarity)
    return score_and_write(folder, config, rank_responses(similarity, questions), questions, receipt)


def text_of(question: Question) -> str:
    return question.sample.messages[0].text


def video_of(question: Question) -> Video:
    """Return the video that the question's text describes."""
    (video,) = question.sample.media()
    assert isinstance(video, Video)
    return video


class FeatureFiles:
    """Normalized features by key, one file each.

    A stopped evaluation continues with the features that are missing. Keys are digests of everything that a feature
    depends on.
    """

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


def text_key(text: str, encoder: DualEncoder) -> str:
    return json_digest([encoder.weights, encoder.preprocessing, "text", text])


def video_key(video: Video, encoder: DualEncoder) -> str:
    frames = [FRAMES.model_dump_json(exclude={"reader", "timeout"}), resolve_reader(FRAMES.reader)]
    return json_digest([encoder.weights, encoder.preprocessing, "video", media_digest(video), *frames])


@torch.no_grad()
def embed_texts(texts: Mapping[str, str], encoder: DualEncoder, features: FeatureFiles, batch_size: int) -> None:
    """Store the features of texts, by key, unless they are stored already."""
    missing = [(key, text) for key, text in texts.items() if key not in features]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        embedded = nn.functional.normalize(encoder.texts([text for _, text in batch]).float(), dim=-1)
        for (key, _), feature in zip(batch, embedded, strict=True):
            features[key] = feature


@torch.no_grad()
def embed_videos(videos: Mapping[str, Video], encoder: DualEncoder, features: FeatureFiles) -> Iterator[str]:
    """Store the features of videos, by key, unless they are stored already; yield each key. Raises MediaError."""
    for key, video in videos.items():
        if key not in features:
            frames = [PILImage.fromarray(frame) for frame in load_video(video.path, FRAMES, video.data).frames]
            embedded = nn.functional.normalize(encoder.images(frames).float(), dim=-1)
            features[key] = nn.functional.normalize(embedded.mean(dim=0), dim=-1)
        yield key


def similarities(text_keys: Iterable[str], video_keys: Iterable[str], features: FeatureFiles) -> np.ndarray:
    """Return the cosines of stored features, float64 [texts, videos]."""
    texts, videos = (np.stack([features[key] for key in keys]).astype(np.float64) for keys in (text_keys, video_keys))
    return texts @ videos.T
