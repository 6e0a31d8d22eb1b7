"""Retrieval with several sentences per video (MSVD): from CLIP4Clip's files to the official figures."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.benchmarks import BENCHMARKS
from eval.dual_encoders import DualEncoder
from eval.features import evaluate_by_features
from eval.run import read_questions
from mmdora.core.errors import UserError
from tests.benchmark_walk import config, questions_of, scored, write
from tests.media import write_video

CAPTIONS = {"a_0_5": ["a dog runs", "a dog"], "b_1_2": ["two men sing"], "c_3_9": ["a car", "a red car", "it drives"]}
# Rows are the sentences of a, a, b, c, c, c; columns are the videos a, b, c.
SIMILARITY = [[0.9, 0.1, 0.2], [0.4, 0.5, 0.1], [0.3, 0.3, 0.2], [0.2, 0.1, 0.8], [0.7, 0.6, 0.5], [0.1, 0.2, 0.3]]


def make_msvd(root: Path) -> Path:
    for i, name in enumerate(CAPTIONS):
        path = write_video(root / "YouTubeClips" / f"{name}.mp4", frames=3 + i, size=(32, 32), rate=1)
        path.rename(path.with_suffix(".avi"))
    write(root / "test_list.txt", "".join(f"{name}\n" for name in CAPTIONS))
    captions = {name: [sentence.split() for sentence in sentences] for name, sentences in CAPTIONS.items()}
    (root / "raw-captions.pkl").write_bytes(pickle.dumps(captions | {"other_1_2": [["unused"]]}))
    return root


@pytest.fixture
def msvd(tmp_path) -> Path:
    (tmp_path / "msvd" / "YouTubeClips").mkdir(parents=True)
    return make_msvd(tmp_path / "msvd")


def test_figures_of_given_similarities(msvd, tmp_path):
    """Ranks by hand: 1, 2, 2 (a tie that video order decides), 1, 3, 1 for the sentences; 1, 3, 1 for the videos."""
    assert [(q.id, q.cluster) for q in questions_of("msvd_retrieval", msvd)][:3] == [
        ("a_0_5/0", "a_0_5"),
        ("a_0_5/1", "a_0_5"),
        ("b_1_2/0", "b_1_2"),
    ]
    np.save(tmp_path / "s.npy", np.asarray(SIMILARITY))
    report = scored("msvd_retrieval", tmp_path / "s.npy", msvd, out=tmp_path / "out")
    ranks = [1, 2, 2, 1, 3, 1]
    assert report["scores"]["official"]["value"] == pytest.approx(100 * ranks.count(1) / 6)
    metrics = report["metrics"]
    assert metrics["text_to_video_R1"] == pytest.approx(50)
    assert (metrics["text_to_video_MedianR"], metrics["text_to_video_MeanR"]) == (1, pytest.approx(10 / 6))
    assert metrics["text_to_video_Std_Rank"] == pytest.approx(np.std(ranks))
    # Video b is closer to a sentence of c (0.6) and of a (0.5) than to its own (0.3): rank 3.
    assert metrics["video_to_text_R1"] == pytest.approx(200 / 3)
    assert metrics["video_to_text_MeanR"] == pytest.approx(5 / 3)
    again = scored("msvd_retrieval", write(tmp_path / "s.json", SIMILARITY), msvd)
    assert again["metrics"] == metrics
    with pytest.raises(UserError, match="expected 6 sentences x 3 videos, found the shape"):
        scored("msvd_retrieval", write(tmp_path / "s.json", SIMILARITY[:5]), msvd)


def test_a_model_embeds_each_video_once(msvd, tmp_path):
    embedded = []

    def images(frames):
        embedded.append(len(frames))
        return torch.nn.functional.one_hot(torch.full((len(frames),), len(embedded) - 1), 3).float()

    def texts(sentences):
        videos = [next(i for i, own in enumerate(CAPTIONS.values()) if sentence in own) for sentence in sentences]
        return torch.nn.functional.one_hot(torch.tensor(videos), 3).float()

    entry = config("msvd_retrieval", msvd, batch_size=4)
    encoder, progress = DualEncoder(texts, images, "weights", "preprocessing"), []
    report = evaluate_by_features(
        encoder, entry, read_questions(entry, by_features=True), tmp_path / "out", progress.append
    )
    assert len(embedded) == 3
    assert sum(progress) == report["n"] == 6
    assert report["scores"]["official"]["value"] == report["metrics"]["video_to_text_R1"] == 100
    assert np.load(tmp_path / "out" / "similarity.npy").shape == (6, 3)
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert json.loads(rows[3]["response"])["best"][0] == "c_3_9"


def test_a_pickle_that_runs_code_is_refused(msvd, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content, message in (
        (pickle.dumps({"a_0_5": Code()}), r"raw-captions\.pkl: cannot be read \(refused posix\.mkdir"),
        (pickle.dumps({"a_0_5": ["a dog"]}), "'a_0_5': expected a list of captions"),
        (pickle.dumps([]), "expected a dict"),
        (pickle.dumps({}), "no captions of the video 'a_0_5'"),
        (b"nonsense", "cannot be read"),
    ):
        (msvd / "raw-captions.pkl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            BENCHMARKS["msvd_retrieval"]().questions(config("msvd_retrieval", msvd))
    assert not (tmp_path / "ran").exists()
