"""Saved composed models: they reload as their README.md says, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mmdora.core.config import ModelConfig
from mmdora.models.loading import load_model, needs_mmdora, save_model, to_plain_transformers
from mmdora.models.model_card import describe_parts, write_model_card
from tests.conftest import ROOT
from tests.media import write_image, write_video
from tests.test_composed import batches, compose, logits
from tests.tiny_models import write_language_model, write_tower

# Loads the models in the given folders as their README.md says, in this order, and compares their logits.
RELOAD = """
import json, re, sys, traceback
from pathlib import Path
import torch

results = {}
for name in sys.argv[1:]:
    code = re.search("```python\\n(.*?)```", Path(name, "README.md").read_text(), re.DOTALL)[1]
    try:
        names = {}
        exec(code, names)
        assert names["processor"].tokenizer.chat_template
        for sample, expected in torch.load(Path(name, "expected.pt")):
            with torch.no_grad():
                torch.testing.assert_close(names["model"].eval()(**sample).logits, expected, atol=1e-5, rtol=1e-5)
        results[name] = ["mmdora" if "mmdora" in sys.modules else "transformers alone", len(code.splitlines())]
    except Exception:
        results[name] = [traceback.format_exc(), 0]
print(json.dumps(results))
"""
PLAIN = {  # models that transformers loads without mmdora
    "clip": ("clip", {"projector": "linear"}),
    "siglip": ("siglip", {}),
    "dinov2": ("dinov2", {}),
    "open_clip_vit": ("open_clip_vit", {}),
    "open_clip_siglip": ("open_clip_siglip", {"projector": "linear"}),
}
TIMM_TRUNK = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "test_vit"}}  # a model of timm itself
RESAMPLER = {"projector": "resampler", "num_queries": 5}
NEEDING_MMDORA = {
    "open_clip": {},
    "timm": {"vision_encoder": {"type": "open_clip", "name": "tiny", "model_config": TIMM_TRUNK}},
    "resampler": RESAMPLER,
    "resampler_plain_tower": RESAMPLER,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parts")
    write_language_model(path / "llama", "llama")
    write_tower(path / "clip", "clip")
    write_image(path / "picture.png")
    write_video(path / "clip.mp4")
    return path


@pytest.fixture(scope="module")
def reloaded(folder, tmp_path_factory) -> dict[str, list]:
    """Save the models of PLAIN and NEEDING_MMDORA and reload all of them in one fresh process."""
    root = tmp_path_factory.mktemp("saved")

    def save(name: str, model, processor, samples: list[dict]) -> None:
        save_model(model, processor, root / name)
        torch.save(list(zip(samples, logits(model, samples), strict=True)), root / name / "expected.pt")

    for name, (tower, settings) in PLAIN.items():
        model, processor = compose(folder, tower, **settings)
        samples = batches(folder, processor)
        expected = logits(model, samples)
        plain = to_plain_transformers(model)
        assert not needs_mmdora(plain)
        save(name, plain, processor, samples)
        for converted, original in zip(logits(plain, samples), expected, strict=True):
            torch.testing.assert_close(converted, original, atol=1e-5, rtol=1e-5)
    for name, settings in NEEDING_MMDORA.items():
        model, processor = compose(folder, "open_clip_vit", **settings)
        if name == "resampler_plain_tower":
            model = to_plain_transformers(model)
        assert needs_mmdora(model)
        save(name, model, processor, batches(folder, processor))
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *PLAIN, *NEEDING_MMDORA],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PLAIN)
def test_plain_transformers_reloads_a_tower_that_it_has(name, reloaded):
    assert reloaded[name] == ["transformers alone", 3]


@pytest.mark.parametrize("name", NEEDING_MMDORA)
def test_import_mmdora_models_is_enough_to_reload(name, reloaded):
    assert reloaded[name] == ["mmdora", 4]


def test_a_tower_without_an_equivalent_is_kept(folder, caplog):
    model, _ = compose(folder, "open_clip_eva")
    with caplog.at_level("WARNING"):
        assert needs_mmdora(to_plain_transformers(model))
    assert "loads only after `import mmdora.models`" in caplog.text


def test_a_saved_model_has_a_readme(folder, tmp_path):
    model, processor = compose(folder, "open_clip_vit", **RESAMPLER)
    save_model(model, processor, tmp_path / "first")
    card = (tmp_path / "first" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
    }
    assert "**Import `mmdora.models` before you load the model**" in card
    assert "- vision encoder: `tiny` (type `open_clip`)" in card
    assert "- projector: `resampler`" in card
    assert "- language model: `llama`" in card
    again, processor = load_model(ModelConfig(path=str(tmp_path / "first"), dtype="float32"))
    save_model(again, processor, tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text() == card.replace("first", "second")
    for file in (*(tmp_path / "first").glob("*.json"), tmp_path / "first" / "README.md"):
        assert str(folder.parent) not in file.read_text()  # no path of this machine
    (tmp_path / "second" / "README.md").write_text("my own")
    save_model(again, processor, tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text() == "my own"


def test_the_readme_names_the_base_models_on_the_hub(folder, tmp_path):
    encoder = {"type": "clip", "name": "openai/clip-vit-large-patch14-336", "pretrained": "refs/pr/8"}
    config = {"vision_encoder": encoder, "language_model": {"path": "lmsys/vicuna-7b-v1.5"}}
    model, _ = compose(folder)
    model.config.composed_of = describe_parts(ModelConfig.model_validate(config))
    write_model_card(model, tmp_path, needs_mmdora=False)
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == [encoder["name"], "lmsys/vicuna-7b-v1.5"]
    assert f"- vision encoder: `{encoder['name']}` (type `clip`, pretrained `refs/pr/8`)" in card
    assert "transformers loads the model without mmdora" in card
    assert "import mmdora" not in card
