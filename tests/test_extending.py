"""docs/extending.md: each example registers itself, and does in use what the page says."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import mmdora
from data_pipelines.dataset import read_source
from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.video import VIDEO_READERS, load_video
from eval.benchmarks import BENCHMARKS, Score
from eval.scoring import score_all
from mmdora.adapters import ADAPTERS, adapter_layers
from mmdora.core.config import EvaluationConfig, ModelConfig, SourceConfig, VideoConfig
from mmdora.models.architectures import ARCHITECTURES
from mmdora.models.loading import load_model
from mmdora.models.vision_encoders import VISION_ENCODERS
from tests.conftest import ROOT
from tests.tiny_models import write_language_model
from tests.tiny_parts import template

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {
    section.split("\n")[0]: "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    for section in PAGE.split("\n## ")[1:]
}
REGISTRIES = (ADAPTERS, ARCHITECTURES, BENCHMARKS, DATASET_FORMATS, VIDEO_READERS, VISION_ENCODERS)


@pytest.fixture(autouse=True)
def registries():
    """What an example registers is removed again."""
    before = [dict(registry._entries) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)


def run(section: str) -> None:
    exec(compile(EXAMPLES[section], f"docs/extending.md: {section}", "exec"), {"__name__": "example"})


def test_a_benchmark(tmp_path):
    run("A benchmark")
    (tmp_path / "flags").mkdir()
    rows = [{"id": str(i), "flag": f"flags/{i}.png", "capital": city} for i, city in enumerate(("Rome", "Oslo"))]
    (tmp_path / "capitals.json").write_text(json.dumps(rows))
    config = EvaluationConfig(name="capitals", benchmark="capitals", data=str(tmp_path))
    questions = BENCHMARKS["capitals"]().questions(config)
    assert questions[0].sample.messages[0].text.endswith("Answer with the name of the city.")
    scores = score_all("capitals", {"0": " rome", "1": ""}, questions)
    assert [(s.official, s.unparsed) for s in scores.values()] == [(1.0, False), (0.0, True)]


def test_a_dataset_format(tmp_path):
    run("A dataset format")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "riddle": "What am I?", "solution": "black"}, {"riddle": "?", "solution": 3}]
    (tmp_path / "book.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = read_source(SourceConfig(path=str(tmp_path / "book.jsonl")))  # recognized by its keys
    assert [sample.messages[1].text for sample in source] == ["black"]
    assert "'solution' must be a string" in source.rejected[0].reason


def test_a_video_reader(tmp_path):
    run("A video reader")
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    np.save(tmp_path / "video.npy", frames)
    clip = load_video(tmp_path / "video.npy", VideoConfig(reader="npy", num_frames=2, timeout=None))
    assert clip.frames.shape == (2, 4, 6, 3)
    assert clip.total_frames == 10


def test_an_adapter_method(tiny):
    run("An adapter method")
    model, _ = tiny
    mmdora.inject_adapters(model, {"language": {"method": "tapered_dora", "rank": 8, "targets": ["q_proj"]}})
    assert [layer.specs["default"].rank for _, layer in adapter_layers(model)] == [8, 4, 1]


def test_a_vision_encoder(tmp_path):
    run("A vision encoder")
    write_language_model(tmp_path / "llama", "llama")
    (tmp_path / "chat.jinja").write_text(template("<image>"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = {"type": "vit", "name": "tiny", "model_config": {**sizes, "image_size": 16, "patch_size": 8}}
    model, processor = load_model(
        ModelConfig(
            vision_encoder=encoder,
            language_model={"path": str(tmp_path / "llama")},
            chat_template=str(tmp_path / "chat.jinja"),
            dtype="float32",
        )
    )
    assert type(model.model.vision_tower).__name__ == "ViTModel"
    assert list(processor.image_processor.image_mean) == [0.5, 0.5, 0.5]


def test_a_model_family():
    run("A model family")
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(2, 2)
    assert set(ARCHITECTURES["my_vlm"].resolve(model)) == {"lm_head"}


def test_a_benchmark_written_for_0_1_0_still_works():
    """Its names `ask` and `of_words` are deprecated."""
    config = EvaluationConfig(name="vqa", benchmark="vqa", data="x")
    with pytest.warns(DeprecationWarning, match="format_prompt"):
        assert BENCHMARKS["vqa"]().ask(config, question="Why?") == "Why?"
    with pytest.warns(DeprecationWarning, match="free_text"):
        assert Score.of_words(1.0, " ") == Score(1.0, 0.0, True)
