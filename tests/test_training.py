"""Batch sizes over processes, and the optimizer groups of each part."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

import mmdora
from mmdora.core.config import ModelConfig, PartConfig
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from mmdora.models.architectures import find_part
from mmdora.models.blocks import blocks_of
from mmdora.models.loading import load_model
from mmdora.training.arguments import micro_batches, use_one_gpu
from mmdora.training.optimizer import optimizer_groups


@pytest.mark.parametrize(
    ("world", "batch", "micro", "expected"),
    [(1, 32, 32, (32, 1)), (2, 32, 32, (16, 1)), (2, 32, 4, (4, 4)), (1, 32, 8, (8, 4))],
)
def test_the_global_batch_does_not_depend_on_the_number_of_processes(world, batch, micro, expected):
    config = load_config("quickstart", [f"training.batch_size={batch}", f"training.micro_batch_size={micro}"])
    assert micro_batches(config.training, world) == expected


def test_a_batch_that_cannot_be_split_is_an_error():
    with pytest.raises(UserError, match=r"batch_size 32 cannot be split over 3 processes.*a multiple of 30"):
        micro_batches(load_config("quickstart", ["training.batch_size=32", "training.micro_batch_size=16"]).training, 3)


def test_one_process_uses_one_gpu(caplog):
    arguments = TrainingArguments(use_cpu=True)
    use_one_gpu(arguments)
    assert not caplog.messages
    arguments._n_gpu = 4
    use_one_gpu(arguments)
    assert arguments.n_gpu == 1
    assert "using 1 of 4 GPUs" in caplog.text


def test_each_part_has_its_own_learning_rate_and_weight_decay(tiny):
    model, _ = tiny
    config = load_config(
        "quickstart",
        [
            "parts.vision.learning_rate=1e-3",
            "parts.projector.learning_rate=null",
            "parts.language.learning_rate=5e-3",
            "parts.language.weight_decay=0.1",
            "training.learning_rate=7e-3",
        ],
    )
    mmdora.inject_adapters(model, config.parts)
    groups = optimizer_groups(model, config)
    rates = {g["name"]: g["lr"] for g in groups}
    assert rates == {"vision": 1e-3, "projector": 7e-3, "language": 5e-3}
    decays = {(g["name"], g["weight_decay"]) for g in groups}
    assert ("language", 0.1) in decays  # A and B
    assert ("language", 0.0) in decays  # magnitudes
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["dora", "full"])
def test_layer_decay_lowers_the_rate_of_earlier_blocks(tiny, method):
    model, _ = tiny
    low_rank = {"method": method} | ({"rank": 2} if method == "dora" else {})
    parts = {"vision": PartConfig.model_validate(low_rank | {"learning_rate": 1e-3, "layer_decay": 0.5})}
    mmdora.inject_adapters(model, parts)
    config = load_config("quickstart").model_copy(update={"parts": parts})
    rates = {id(p): g["lr"] for g in optimizer_groups(model, config) for p in g["params"]}
    blocks = blocks_of(model, find_part(model, "vision"))
    assert len(blocks) == 3
    for behind, block in enumerate(reversed(blocks), start=1):
        trained = [p for p in model.get_submodule(block).parameters() if p.requires_grad]
        assert {rates[id(p)] for p in trained} == {1e-3 * 0.5**behind}
    if method == "full":
        tower = dict(model.model.vision_tower.named_parameters())
        before, after = (next(n for n in tower if key in n) for key in ("conv1.weight", "ln_post.weight"))
        assert rates[id(tower[before])] == 1e-3 * 0.5**4
        assert rates[id(tower[after])] == 1e-3
    projector = {"projector": PartConfig(method="full", layer_decay=0.5)}
    model.model.multi_modal_projector.requires_grad_(True)
    config = config.model_copy(update={"parts": parts | projector})
    with pytest.raises(UserError, match=r"parts\.projector\.layer_decay: the part has no blocks"):
        optimizer_groups(model, config)


@pytest.mark.parametrize("method", ["lora", "dora", "dvora", "magnitude", "full"])
def test_last_blocks_trains_only_the_last_blocks(tiny, method, tmp_path):
    model, _ = tiny
    mmdora.inject_adapters(model, {"language": {"method": method, "last_blocks": 2}})
    moved = {n for n, p in model.named_parameters() if p.requires_grad}
    blocks = tuple(f"model.language_model.layers.{i}." for i in (1, 2))
    assert moved
    assert all(name.startswith(blocks) for name in moved)
    assert all(any(name.startswith(block) for name in moved) for block in blocks)
    for name in moved:
        model.get_parameter(name).data += 0.01
    mmdora.save_adapter(model, tmp_path)
    again, _ = load_model(ModelConfig(path="assets/tiny-llava", dtype="float32"))
    mmdora.load_adapter(again, tmp_path)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == moved


def test_more_blocks_than_there_are_is_an_error(tiny):
    with pytest.raises(UserError, match=r"parts.language.last_blocks: 9 is too many; the part has 3 blocks"):
        mmdora.inject_adapters(tiny[0], {"language": {"method": "full", "last_blocks": 9}})


def test_a_convolutions_magnitude_is_not_decayed():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    mmdora.inject_adapters(net, {"": {"method": "dora", "targets": ["0"]}})
    config = load_config("quickstart", ["training.weight_decay=0.1"])
    config = config.model_copy(update={"parts": {"": PartConfig(method="dora")}})
    decays = {id(p): g["weight_decay"] for g in optimizer_groups(net, config) for p in g["params"]}
    tensors = net[0].adapter_tensors("default")
    assert {name: decays[id(p)] for name, p in tensors.items()} == {
        "lora_A.weight": 0.1,
        "lora_B.weight": 0.1,
        "lora_magnitude_vector": 0.0,
    }
