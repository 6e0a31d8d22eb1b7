"""Configs: shipped ones are valid, all problems are reported at once with the nearest name, overrides apply."""

from __future__ import annotations

import pytest
import yaml

from mmdora.apps.check_config import check_config
from mmdora.core.config import RunConfig
from mmdora.core.config_files import dump_config, load_config, parse_config
from mmdora.core.errors import UserError
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_validates(path):
    config = load_config(str(path))
    assert isinstance(config, RunConfig)
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_opens_with_its_launch_command(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(("# make ", "# mmdora train ", "# torchrun ", "# deepspeed "))


def test_all_problems_at_once_with_the_nearest_key():
    overrides = [
        "training.batch_sise=3",
        "model.dtype=float7",
        "training.epochs=many",
        "data.train.0.pth=x",
        "parts.vision.methd=dora",
    ]
    with pytest.raises(UserError) as caught:
        load_config("quickstart", overrides)
    message = str(caught.value)
    assert "training.batch_sise: unknown key. Did you mean 'batch_size'?" in message
    assert "model.dtype" in message
    assert "training.epochs" in message
    assert "data.train.0.pth: unknown key. Did you mean 'path'?" in message
    assert "parts.vision.methd: unknown key. Did you mean 'method'?" in message


def test_an_unknown_config_suggests_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'quickstart'"):
        load_config("quikstart")


def test_overrides():
    config = load_config(
        "quickstart",
        [
            "training.learning_rate=2e-4",
            "data.train.0.weight=3",
            "training.report_to=wandb",
            "data.video={num_frames: 2}",
        ],
    )
    assert config.training.learning_rate == 2e-4
    assert config.data.train[0].weight == 3
    assert config.training.report_to == ["wandb"]
    assert config.data.video.num_frames == 2
    assert load_config("quickstart", ["data.train=[mine.json]"]).data.train[0].path == "mine.json"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", "is not an override"),
        ("data.train.9.path=x", "not an index"),
        ("training.seed.x=1", "not a section"),
        ("training.seed=[", "not valid YAML"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(UserError, match=message):
        load_config("quickstart", [override])


def test_a_batch_must_be_whole_micro_batches():
    with pytest.raises(UserError, match="must be a multiple of 'micro_batch_size'"):
        load_config("quickstart", ["training.batch_size=30", "training.micro_batch_size=8"])


def test_a_config_is_frozen():
    config = load_config("quickstart")
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 1


def test_all_invalid_names_and_paths_are_reported_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    overrides = [
        f"model.path={tmp_path}/empty",
        "model.chat_template=gone.jinja",
        "parts.projector.rank=4",
        "parts.vision.method=dorra",
        "data.train.0.path=gone.json",
        "data.video.reader=decrod",
        "training.deepspeed=zero9",
        "evaluation.0.benchmark=vqaa",
    ]
    with pytest.raises(UserError) as caught:
        check_config(load_config("quickstart", overrides))
    heading, *lines = str(caught.value).splitlines()
    assert heading == "the config is not valid:"
    assert [line.split(":")[0].strip() for line in lines] == [
        "model.path",
        "model.chat_template",
        "parts.vision.method",
        "parts.projector.rank",
        "data.train.0.path",
        "data.video.reader",
        "training.deepspeed",
        "evaluation.0.benchmark",
    ]


def test_a_model_can_be_a_hub_id():
    check_config(load_config("quickstart", ["model.path=llava-hf/llava-1.5-7b-hf"]))
    with pytest.raises(UserError, match=r"model\.path: no such directory '/llava-1\.5-7b-hf'"):
        check_config(load_config("quickstart", ["model.path=/llava-1.5-7b-hf"]))
