"""Processors get the true times of sampled frames, and their true spacing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Sample, Text, Video
from data_pipelines.video import load_video
from data_pipelines.video.metadata import video_metadata
from mmdora.core.config import VideoConfig
from tests.families import FAMILIES
from tests.media import write_image, write_video
from tests.test_encoding import user

VARYING = [0, 100, 200, 300, 5000, 5100, 8000, 8100, 9900, 10000]  # milliseconds


@pytest.fixture(scope="module")
def constant(tmp_path_factory) -> Path:
    """40 frames at 10 frames per second."""
    return write_video(tmp_path_factory.mktemp("constant") / "v.mp4", frames=40, rate=10)


@pytest.fixture(scope="module")
def varying(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("varying") / "v.mkv", frames=len(VARYING), times=VARYING)


def encode(family: str, video: Path | list[Path], **config: Any) -> tuple[dict[str, torch.Tensor], str]:
    """Return the encoded question and its decoded prompt."""
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs num2words")
    _, processor = FAMILIES[family].build()
    videos = [Video(path) for path in (video if isinstance(video, list) else [video])]
    sample = Sample("s", (user(*videos, Text("What?")),), "test")
    encoded = Encoder(processor, VideoConfig(**config)).encode_prompt(sample)
    return encoded, processor.tokenizer.decode(encoded["input_ids"][0])


def test_a_video_knows_the_times_of_its_frames(constant, varying):
    video = load_video(varying, VideoConfig(num_frames=5))
    assert video.times == pytest.approx([VARYING[i] / 1000 for i in video.indices])
    assert video.times[-1] == video.duration == pytest.approx(10.0)
    assert video.spacing == pytest.approx(2.5)
    part = load_video(constant, VideoConfig(num_frames=4, start=1.0, end=2.0))
    assert part.times == pytest.approx([1.0, 1.3, 1.6, 1.9])
    assert part.spacing == pytest.approx(0.3)
    assert part.duration == pytest.approx(4.0)
    one = load_video(constant, VideoConfig(num_frames=1))
    assert one.spacing == pytest.approx(0.1)


def test_the_metadata_give_the_true_times(constant, varying, tmp_path):
    for path, config in ((constant, {"start": 1.0, "end": 2.0}), (varying, {}), (varying, {"start": 4.0, "end": 9.0})):
        video = load_video(path, VideoConfig(num_frames=4, **config))
        metadata = video_metadata(video)
        assert all(isinstance(index, int) for index in metadata["frames_indices"])
        assert [i / metadata["fps"] for i in metadata["frames_indices"]] == pytest.approx(video.times, abs=1e-3)
        assert metadata["total_num_frames"] > max(metadata["frames_indices"])
    # A constant rate is handed on as it is.
    video = load_video(constant, VideoConfig(num_frames=4))
    assert video_metadata(video) == {
        "total_num_frames": 40,
        "fps": 10.0,
        "frames_indices": list(video.indices),
        "duration": 4.0,
    }
    for i in range(6):
        write_image(tmp_path / f"{i}.png", i)
    images = load_video(tmp_path, VideoConfig(num_frames=3, frames_fps=2.0))
    assert images.times == pytest.approx([i / 2 for i in images.indices])


def test_seconds_per_grid_of_qwen2_5_vl(constant, varying):
    """Before: 20 / 8 frames of the whole file for any part of it, 2 s here for frames 0.3 s apart."""
    part, _ = encode("qwen2_5_vl", constant, num_frames=4, start=1.0, end=2.0)
    assert part["second_per_grid_ts"].tolist() == pytest.approx([0.6])
    whole, _ = encode("qwen2_5_vl", constant, num_frames=4)
    assert whole["second_per_grid_ts"].tolist() == pytest.approx([2 * 3.9 / 3])
    both, _ = encode("qwen2_5_vl", [varying, constant], num_frames=4)
    assert both["second_per_grid_ts"].tolist() == pytest.approx([2 * 10 / 3, 2 * 3.9 / 3])
    assert both["second_per_grid_ts"].dtype == part["second_per_grid_ts"].dtype == torch.float32


def test_times_in_the_prompts_of_qwen3_vl_and_smolvlm(constant, varying):
    _, prompt = encode("qwen3_vl", varying, num_frames=10)
    pairs = [(VARYING[i] + VARYING[i + 1]) / 2000 for i in range(0, 10, 2)]
    assert [float(t) for t in re.findall(r"<([\d.]+) seconds>", prompt)] == pytest.approx(pairs, abs=0.051)
    _, prompt = encode("qwen3_vl", constant, num_frames=4, start=1.0, end=2.0)
    assert [float(t) for t in re.findall(r"<([\d.]+) seconds>", prompt)] == pytest.approx([1.15, 1.75], abs=0.051)
    _, prompt = encode("smolvlm", varying, num_frames=10)
    times = [60 * int(m) + int(s) for m, s in re.findall(r"(\d\d):(\d\d)", prompt.split("[H:MM:SS]")[1])]
    assert times == [time // 1000 for time in VARYING]
    assert "0:00:10" in prompt


def test_a_video_of_one_repeated_frame_has_a_spacing(tmp_path):
    still = write_video(tmp_path / "still.mp4", frames=1, rate=5)
    encoded, _ = encode("qwen2_5_vl", still, num_frames=4)
    assert encoded["second_per_grid_ts"].isfinite().all()
    assert (encoded["second_per_grid_ts"] > 0).all()
