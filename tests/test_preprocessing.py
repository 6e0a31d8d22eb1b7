"""Images padded to a square as in LLaVA's own code, in training, evaluation, chat and the merged model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, CLIPImageProcessor, SiglipImageProcessor

from mmdora.apps.load_target import load_target
from mmdora.core.config import ModelConfig
from mmdora.core.errors import UserError
from mmdora.models.loading import load_shape
from mmdora.models.preprocessing import pad_to_square
from tests.families import CROPPED, FAMILIES
from tests.media import picture, write_image
from tests.test_composed import compose
from tests.test_runs import command
from tests.tiny_models import write_language_model, write_tower
from tests.tiny_parts import SIDE, SQUARE

SHAPES = {"wide": (64, 48), "tall": (31, 90), "square": (40, 40), "odd": (33, 20), "line": (50, 1), "small": (7, 4)}
LEVEL = 1 / 255 / 0.26  # one of 256 pixel levels, divided by CLIP's smallest standard deviation


def llava_pixels(image: Image.Image, images: CLIPImageProcessor) -> torch.Tensor:
    """Apply expand2square of LLaVA's llava/mm_utils.py and then CLIP's preprocessing, in PIL and numpy."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in images.image_mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    small = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    normal = (small - np.array(images.image_mean)) / np.array(images.image_std)
    return torch.tensor(normal.transpose(2, 0, 1), dtype=torch.float32)


def pixels(processor, image: Image.Image) -> torch.Tensor:
    return processor.image_processor(image, return_tensors="pt")["pixel_values"][0]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny LLaVA-1.5 with CLIP's image processor, which crops."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    model, processor = FAMILIES["llava"].build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def padded(base):
    """The processor of `base` with `pad_to_square`."""
    return load_shape(ModelConfig(path=str(base), dtype="float32", pad_to_square=True))[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_pixel_values_equal_those_of_llava(shape, padded, tmp_path):
    image, processor = picture(1, SHAPES[shape]), padded
    want = llava_pixels(image, processor.image_processor)
    assert pixels(processor, image).shape == (3, SIDE, SIDE)
    # torchvision, AutoProcessor's backend, rounds some pixels to a neighbouring one of 256 levels when it resizes.
    torch.testing.assert_close(pixels(processor, image), want, atol=1.01 * LEVEL, rtol=0)
    processor.save_pretrained(tmp_path)
    exact = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    torch.testing.assert_close(exact(image, return_tensors="pt")["pixel_values"][0], want, atol=1e-5, rtol=0)
    assert torch.equal(pixels(AutoProcessor.from_pretrained(tmp_path), image), pixels(processor, image))


def test_without_the_setting_nothing_changes(base):
    processor = load_shape(ModelConfig(path=str(base), dtype="float32"))[1]
    assert processor.image_processor.to_dict() == AutoImageProcessor.from_pretrained(base).to_dict()
    image = picture(1, SHAPES["wide"])
    assert torch.equal(pixels(processor, image), pixels(AutoProcessor.from_pretrained(base), image))
    assert (pixels(processor, image) - llava_pixels(image, processor.image_processor)).abs().max() > 10 * LEVEL


def test_mean_and_size_of_the_processor_are_kept():
    """Also for a processor that resizes to more than its crop, and for one that does not crop."""
    _, processor = FAMILIES["llava"].build()
    own = {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.26, 0.5, 1.0]}
    image = picture(2, SHAPES["wide"])
    for images in (
        CLIPImageProcessor(size={"shortest_edge": 2 * SIDE}, crop_size=SQUARE, **own),
        SiglipImageProcessor(size=SQUARE, resample=3, **own),
    ):
        processor.image_processor = images
        for _ in range(2):  # applying it twice changes nothing
            pad_to_square(processor, "it")
            torch.testing.assert_close(pixels(processor, image), llava_pixels(image, images), atol=1.01 * LEVEL, rtol=0)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llava"])
def test_pad_to_square_is_an_error_for_other_families(name):
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs num2words")
    _, processor = FAMILIES[name].build()
    with pytest.raises(
        UserError, match=r"model\.pad_to_square: it does not crop images to one square .*remove the key"
    ):
        pad_to_square(processor, "it")


def test_pad_to_square_is_an_error_for_other_crops_and_composed_models(tmp_path):
    _, processor = FAMILIES["llava"].build()
    processor.image_processor = CLIPImageProcessor(**CROPPED | {"crop_size": {"height": SIDE, "width": 2 * SIDE}})
    with pytest.raises(UserError, match=r"model\.pad_to_square"):
        pad_to_square(processor, "it")
    write_language_model(tmp_path / "llama", "llama")
    write_tower(tmp_path / "clip", "clip")
    with pytest.raises(UserError, match=r"model\.pad_to_square: a composed model does not crop"):
        compose(tmp_path, pad_to_square=True)


def test_a_run_and_its_merged_model_pad(base, padded, tmp_path, capsys):
    """Training, evaluation and chat use the padding processor, and plain transformers loads it after the merge."""
    write_image(tmp_path / "wide.png", size=SHAPES["wide"])
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "one of two"}]
    rows = [{"id": "0", "image": "wide.png", "conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    run, merged = tmp_path / "run", tmp_path / "merged"
    settings = [
        f"model={{path: {base}, dtype: float32, pad_to_square: true}}",
        f"data.train=[{tmp_path}/data.json]",
        f"training={{output: {run}, max_steps: 1, batch_size: 1, micro_batch_size: 1}}",
        "evaluation=[]",
    ]
    assert command("train", "quickstart", *settings) == 0
    assert command("merge", str(run), str(merged)) == 0
    assert (
        f"{merged} loads with AutoModelForImageTextToText and AutoProcessor, without mmdora" in capsys.readouterr().out
    )
    card = (merged / "README.md").read_text()
    assert f"Base model: `{base.name}`" in card
    assert 'AutoProcessor.from_pretrained("merged")' in card
    assert str(tmp_path.parent) not in card
    image = Image.open(tmp_path / "wide.png")
    for processor in (load_target(str(run)).processor, AutoProcessor.from_pretrained(merged)):
        assert torch.equal(pixels(processor, image), pixels(padded, image))
