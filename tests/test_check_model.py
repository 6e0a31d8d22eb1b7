"""A model, a processor and data that do not fit together are reported before training, by `doctor` and by `train`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.dataset import TrainDataset
from data_pipelines.encoding import Encoder
from data_pipelines.ledger import Ledger
from data_pipelines.samples import Image, Video
from data_pipelines.sources import read_source
from mmdora.apps.check_model import check_model, count_features, media_problems, tokenizer_problems
from mmdora.core.config import RunConfig, SourceConfig, VideoConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError
from mmdora.models.new_tokens import add_tokens
from tests.families import FAMILIES
from tests.media import write_image
from tests.test_runs import command


def changed(folder: Path, file: str, **values) -> None:
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | values))


def longer_tokenizer(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 600, "content": "<extra>", "special": False, "normalized": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    settings["added_tokens"].append(token | flags)
    settings["model"]["vocab"] |= {f"extra{i}": i for i in range(512, 601)}
    (folder / "tokenizer.json").write_text(json.dumps(settings))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokenizer": (longer_tokenizer, "embeddings have only 512 rows"),
    "image token": (
        lambda folder: changed(folder, "config.json", image_token_index=5),
        "the processor writes 3 ('<image>') for an image, but image_token_id in config.json is 5",
    ),
    "processor's strategy": (
        lambda folder: changed(folder, "processor_config.json", vision_feature_select_strategy="full"),
        "features; make vision_feature_select_strategy",
    ),
    "config's strategy": (
        lambda folder: changed(folder, "config.json", vision_feature_select_strategy="full"),
        "number of patches is not consistent with the image size",
    ),
    "number of tokens": (
        lambda folder: changed(folder, "processor_config.json", num_image_tokens=50),
        "features; make vision_feature_select_strategy",
    ),
}


@pytest.fixture
def data(tmp_path) -> Path:
    write_image(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a thing"}]
    rows = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize("name", FAULTS)
def test_doctor_and_train_report_a_model_that_does_not_fit_its_processor(name, data, capsys):
    model = data / "model"
    shutil.copytree(find_path("assets/tiny-llava"), model)
    fault, message = FAULTS[name]
    fault(model)
    arguments = ["quickstart", f"data.train=[{data}/data.json]", f"model.path={model}", "evaluation=[]"]
    arguments += [f"training.output={data}/run"]
    assert command("doctor", *arguments) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert message in told
    assert "[model.path]" in told
    assert command("train", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (data / "run").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_fits_its_processor(name):
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs num2words")
    model, processor = FAMILIES[name].build()
    encoder = Encoder(processor, VideoConfig(num_frames=4))
    assert tokenizer_problems(model, processor.tokenizer) == []
    for kind in (Image, Video) if "video" in FAMILIES[name].media else (Image,):
        assert media_problems(model, encoder, kind) == []
    if name.startswith("llava") or name in ("paligemma", "gemma3", "internvl"):
        encoded = encoder.filler(Image)
        assert count_features(model, encoded, "image") == (encoded["input_ids"] == model.config.image_token_id).sum()


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "llava_onevision", "qwen2_vl", "idefics3", "gemma3", "internvl"]
)
def test_a_wrong_image_token_is_found_in_every_family(name):
    model, processor = FAMILIES[name].build()
    right = model.config.image_token_id
    for wrong in (right - 1, right + 1):
        model.config.image_token_id = wrong
        ((setting, text),) = media_problems(model, Encoder(processor), Image)
        assert setting == "model.path"
        assert f"the processor writes {right} " in text
        assert f"image_token_id in config.json is {wrong} " in text


def dataset(folder: Path, encoder: Encoder, with_image: int, without: int) -> TrainDataset:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a thing"}]
    write_image(folder / "a.png")
    rows = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(with_image)]
    rows += [{"id": f"t{i}", "conversations": turns} for i in range(without)]
    path = folder / f"{with_image}-{without}.json"
    path.write_text(json.dumps(rows))
    source = read_source(SourceConfig(path=str(path)))
    return TrainDataset([source], encoder, Ledger(Path(os.devnull), 0, 1.0), 0)


def test_text_for_a_family_that_needs_images_is_an_error_before_training(tmp_path):
    """PaliGemma's processor needs an image in every sample; a few such samples are skipped, as any others."""
    parts, training = {"language": {"method": "full"}}, {"output": "x"}
    data = {"train": [{"path": "x"}]}
    config = RunConfig.model_validate({"model": {"path": "x"}, "parts": parts, "data": data, "training": training})
    model, processor = FAMILIES["paligemma"].build()
    encoder = Encoder(processor)
    check_model(config, model, dataset(tmp_path, encoder, 8, 0))
    check_model(config, model, dataset(tmp_path, encoder, 199, 1))
    with pytest.raises(
        UserError, match=r"data\.train: 2 of 8 samples have no image or video, which the model does not"
    ):
        check_model(config, model, dataset(tmp_path, encoder, 6, 2))
    model, processor = FAMILIES["llava"].build()
    check_model(config, model, dataset(tmp_path, Encoder(processor), 6, 2))


def test_counting_features_leaves_every_weight_where_it_is(tiny):
    """The rows of new tokens are one module with two names, below the embeddings and the head."""
    model, processor = tiny
    add_tokens(model, processor, ["<left>", "<right>"])
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert media_problems(model, Encoder(processor), Image) == []
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
