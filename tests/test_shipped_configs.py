"""The shipped configs for the models people tune: each tunes what it says, at true size, on the meta device."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import mmdora
from mmdora.adapters.injection import InjectionReport
from mmdora.core.config import RunConfig
from mmdora.core.config_files import find_path, load_config, shipped_configs, shipped_name, shipped_path
from mmdora.core.deepspeed import read_deepspeed_config
from mmdora.models.architectures import ARCHITECTURES, architecture_of
from mmdora.models.language_models import auto_class, is_language_model
from mmdora.planning.activations import Activations, measure
from mmdora.planning.engine_memory import (
    MemoryEstimate,
    ParallelSetup,
    cast_parameters,
    memory_with_deepspeed,
    memory_without_deepspeed,
    model_sizes,
)
from mmdora.planning.planner import hidden_size, prepare
from mmdora.training.arguments import micro_batches
from tests.conftest import ROOT
from tests.published_sizes import PUBLISHED

OWN = {"quickstart", "tiny_base", "nlvr"}  # of the tiny base, which other tests run
NAMES = [name for path in shipped_configs() if (name := shipped_name(path)) not in OWN]
SHARES = {  # trainable percent
    "llava-1.5-7b_full_instruct": 95.70,  # all but the vision encoder
    "llava-1.5-7b_lora_instruct": 4.61,  # the DoRA paper's
    "llava-1.5-7b_dora_instruct": 4.63,  # the DoRA paper's
    "llava-1.5-7b_stage2_dora_instruct": 4.63,
    "llava-1.5-7b_stage1_projector": 0.30,
    "llava-1.5-13b_dora_instruct": 3.86,
    "llava-next-7b_dora_instruct": 4.63,
    "llava-next-video-7b_dora_instruct": 4.63,
    "llava-onevision-7b_dora_instruct": 2.20,
    "qwen2.5-vl-7b_dora_instruct": 1.93,
    "qwen3-vl-8b_dora_instruct": 1.97,
    "smolvlm-2b_dora_instruct": 1.61,
    "paper/commonsense_llama-7b_lora_r32": 0.83,  # the DoRA paper's, as the two below
    "paper/commonsense_llama-7b_dora_r16": 0.43,
    "paper/commonsense_llama-7b_dora_r32": 0.84,
}


def build(path: str) -> nn.Module:
    config = PUBLISHED[path][0]()
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=torch.bfloat16)


@cache
def injected(name: str) -> tuple[RunConfig, nn.Module, InjectionReport]:
    """The config, its model on the meta device with adapters, and what they are."""
    config = load_config(name)
    assert config.model.path is not None
    model = build(config.model.path)
    assert model.config.model_type in ARCHITECTURES or is_language_model(model.config)
    return config, model, mmdora.inject_adapters(model, config.parts)


def test_every_config_is_checked():
    assert set(NAMES) == set(SHARES)


@pytest.mark.parametrize("path", list(PUBLISHED))
def test_the_sizes_are_the_published_ones(path):
    billions = sum(p.numel() for p in build(path).parameters()) / 1e9
    assert abs(billions - PUBLISHED[path][1]) < 0.0051


@pytest.mark.parametrize("name", NAMES)
def test_what_a_config_tunes(name):
    config, model, report = injected(name)
    assert abs(report.percent - SHARES[name]) < 0.01
    inside = architecture_of(model).resolve(model)
    for part in report.parts:
        blocks = model.config.get_text_config().num_hidden_layers
        if name.startswith("paper/"):  # q, k, v, up, down
            assert len(part.modules) == 5 * blocks
            assert {path.rpartition(".")[2] for path in part.skipped} == {"o_proj", "gate_proj"}
            continue
        assert part.skipped == []
        if part.name == "language" and part.method != "full":
            assert len(part.modules) == 7 * blocks  # q, k, v, o, gate, up, down
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(any(inside[part].holds(name) for part in config.parts) for name in trained)


def head_of(name: str) -> str:
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    return " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))


def gpus_of(name: str) -> int:
    found = re.search(r"Meant for (\d+) GPUs", head_of(name))
    return int(found[1]) if found else 1


def planned(name: str, activations: Activations) -> MemoryEstimate:
    """Of one of the GPUs that the config is meant for."""
    config, model, _ = injected(name)
    gpus, engine = gpus_of(name), config.training.deepspeed
    run = ParallelSetup(gpus, gpus, config.training.batch_size // (config.training.micro_batch_size * gpus), 2)
    sizes = model_sizes(model, hidden_size(model))
    if engine is None:
        return memory_without_deepspeed(sizes, run, activations)
    return memory_with_deepspeed(sizes, run, activations, engine, read_deepspeed_config(engine)[1])


@pytest.mark.parametrize("name", NAMES)
def test_its_head_says_how_to_start_it_and_what_it_takes(name):
    """The command, and the bytes of weights and optimizer states as `mmdora plan` counts them."""
    config, _, _ = injected(name)
    text, head, gpus = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"), head_of(name), gpus_of(name)
    assert gpus > 1 or "Meant for one GPU" in head
    launch = f"# deepspeed --num_gpus {gpus} train.py {name}" if gpus > 1 else f"# mmdora train {name}"
    assert text.startswith(launch)
    assert (config.training.deepspeed is not None) == (gpus > 1)
    memory = planned(name, Activations(0, 0, 0))
    said = float(re.search(r"optimizer states ([\d.]+) GB", head)[1])
    assert (memory.states + memory.gradients) / 1e9 == pytest.approx(said, abs=0.051)
    peak = float(re.search(r"`mmdora plan` estimates ([\d.]+) GB per GPU", head)[1])
    activations = float(re.search(r"about ([\d.]+) GB of activations", head)[1])
    assert peak == pytest.approx(said + activations + memory.buffers / 1e9, abs=0.16)
    card = float(re.search(r"Meant for .*? of (\d+) GB", head)[1])
    assert 1.1 * peak < card


FIRST = "llava-1.5-7b_dora_instruct"
MEASURED = [FIRST, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != FIRST)]


@pytest.mark.parametrize("name", MEASURED)
def test_the_activations_that_its_head_tells(name):
    """One micro-batch on the meta device; of a picture too where a picture's size is fixed."""
    config = injected(name)[0]
    model = build(config.model.path)
    mmdora.inject_adapters(model, config.parts)
    if config.training.deepspeed is not None:
        cast_parameters(model, torch.bfloat16)
    prepare(model, config)
    found = re.search(r"about ([\d.]+) GB of activations with checkpointing at ([\d,]+) tokens", head_of(name))
    micro, tokens = config.training.micro_batch_size, int(found[2].replace(",", ""))
    ids = torch.full((micro, tokens // micro), 7)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "llava":
        ids[:, :576] = model.config.image_token_id
        batch["pixel_values"] = torch.ones(micro, 3, 336, 336, dtype=torch.bfloat16)
    activations = measure(model, batch, lambda output: output.loss)
    assert planned(name, activations).activations / 1e9 == pytest.approx(float(found[1]), abs=0.051)


@pytest.mark.parametrize("name", NAMES)
def test_its_settings_go_together(name):
    config = load_config(name)
    for world in (1, 2, 4, 8):
        micro_batches(config.training, world)  # the global batch splits over as many GPUs
    assert config.training.output == f"runs/{name}"
    assert config.training.gradient_checkpointing
    if config.model.chat_template is not None:
        assert find_path(config.model.chat_template).is_file()
    if config.training.deepspeed is not None:
        assert shipped_path(f"configs/deepspeed/{config.training.deepspeed}.json") is not None


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_its_reason(name):
    """A comment stands beside each line with a number; the scheduler's name and paths need none."""
    for line in (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        assert len(line) <= 120
        setting, _, reason = line.partition("  # ")
        if not line.startswith("#") and re.search(r": [\d.]+(e-?\d+)?$|: \{.*\d", setting):
            assert reason, line


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_padded_where_hugging_face_crops_what_llava_pads(name):
    """What `mmdora convert` makes pads by itself, and other families do not crop."""
    model = load_config(name).model
    assert model.pad_to_square == (model.path or "").startswith("llava-hf/llava-1.5-")


def test_the_two_stages_are_llavas_recipe():
    first, second = load_config("llava-1.5-7b_stage1_projector"), load_config("llava-1.5-7b_stage2_dora_instruct")
    assert set(first.parts) == {"projector"}
    assert (first.training.learning_rate, first.training.batch_size) == (1e-3, 256)
    language, projector = second.parts["language"], second.parts["projector"]
    assert (language.method, language.rank, language.alpha) == ("dora", 128, 256)
    assert (second.training.learning_rate, projector.learning_rate, second.training.batch_size) == (2e-4, 2e-5, 128)
    for stage in (first, second):
        assert stage.model.dtype == "bfloat16"
        assert stage.data.max_length == 2048
        assert (stage.training.epochs, stage.training.lr_scheduler, stage.training.warmup_ratio) == (1, "cosine", 0.03)
    heads = [(ROOT / "configs" / f"{Path(c.training.output).name}.yaml").read_text() for c in (first, second)]
    assert f"mmdora merge {first.training.output} {second.model.path}" in heads[1]
    assert f" {first.model.path} --vision-tower" in heads[0]


def test_full_tuning_is_llavas_second_stage():
    config, model, report = injected("llava-1.5-7b_full_instruct")
    dora = load_config("llava-1.5-7b_dora_instruct")
    assert (config.model, config.data) == (dora.model, dora.data)
    training = config.training
    assert (training.learning_rate, training.batch_size, training.deepspeed) == (2e-5, 128, "zero3")
    assert {part.learning_rate for part in config.parts.values()} == {None}
    assert (training.epochs, training.lr_scheduler, training.warmup_ratio) == (1, "cosine", 0.03)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("model.vision_tower.")}
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_and_dora_differ_by_the_method_alone():
    lora, dora = (load_config(f"llava-1.5-7b_{method}_instruct") for method in ("lora", "dora"))
    assert lora.parts["language"].model_copy(update={"method": "dora"}) == dora.parts["language"]
    assert lora.parts["projector"] == dora.parts["projector"]
    assert (lora.model, lora.data) == (dora.model, dora.data)
    assert lora.training.model_copy(update={"output": dora.training.output}) == dora.training


@pytest.mark.parametrize(
    ("tag", "method", "rank"), [("lora_r32", "lora", 32), ("dora_r16", "dora", 16), ("dora_r32", "dora", 32)]
)
def test_the_commonsense_runs_are_the_papers(tag, method, rank):
    config = load_config(f"paper/commonsense_llama-7b_{tag}")
    language = config.parts["language"]
    assert (language.method, language.rank, language.alpha, language.dropout) == (method, rank, 2 * rank, 0.05)
    assert language.targets == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    training = config.training
    assert (training.learning_rate, training.batch_size, training.epochs) == (2e-4, 16, 3)
    assert training.warmup_steps == 100
    assert [entry.benchmark for entry in config.evaluation] == ["commonsense"]
