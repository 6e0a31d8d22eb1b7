"""The whole grid of DDP and ZeRO stages on two processes, each run compared with one process on the same samples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.grid import Grid, deepspeed_file, write_combinations, write_mixed
from tests.test_families import build
from tests.test_zero import COMMON, NEW_TOKENS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only"),
]

OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero3-offload")
VARIANTS = {
    "plain": [],
    "checkpointed": ["training.gradient_checkpointing=true"],
    "accumulated": ["training.micro_batch_size=1"],  # four times
}
TWENTY = ["training.batch_size=8", "training.micro_batch_size=4", "training.max_steps=20"]


def part(method: str) -> str:
    rank = "" if method in ("magnitude", "full") else "rank: 4, "
    return f"{{method: {method}, {rank}learning_rate: 3.0e-3}}"


EVERYWHERE = "parts={{vision: {0}, projector: {1}, language: {0}}}"
METHODS = {
    **{m: [EVERYWHERE.format(part(m), part("full"))] for m in ("lora", "dvora", "magnitude")},
    "full": [f"parts={{projector: {part('full')}, language: {part('full')}}}"],
    "embeddings": ["parts={language: {method: dora, rank: 4, targets: [embed_tokens, q_proj]}}"],
    "new tokens": [NEW_TOKENS],
    "packing": ["data.packing=true", "data.max_length=700"],
    "the projector alone": [f"parts={{projector: {part('full')}}}"],
}
EXPERTS = "targets: [experts.gate_up_proj, experts.down_proj, q_proj]"
FAMILIES: dict[str, list[str]] = {
    "qwen2_5_vl": [],
    "qwen3_vl_moe": [f"parts.language={{method: dora, rank: 4, {EXPERTS}}}"],
    "llava_next_video": [],
    "internvl": [],
}


def new_grid(folder: Path, data: str, settings: list[str]) -> tuple[Grid, dict[str, str]]:
    """Return a grid on the data `mixed` or `combinations`, and the setting that selects each engine."""
    files = {"mixed": write_mixed(folder), "combinations": write_combinations(folder)}
    configs = {f"zero{n}": deepspeed_file(folder, f"stage{n}", n) for n in range(4)}
    configs["zero3-offload"] = deepspeed_file(folder, "offload", 3, **OFFLOAD)
    engines = {"ddp": "training.deepspeed=null"} | {
        name: f"training.deepspeed={path}" for name, path in configs.items()
    }
    return Grid(folder, [*COMMON, f"data.train=[{{path: {files[data]}, format: llava}}]", *settings]), engines


@pytest.fixture(scope="module")
def curves(tmp_path_factory) -> Grid:
    """20 steps with every engine."""
    grid, engines = new_grid(tmp_path_factory.mktemp("curves"), "mixed", TWENTY)
    grid.add("one", "training.micro_batch_size=8")
    grid.run(processes=1)
    for engine in ENGINES:
        for variant, settings in VARIANTS.items():
            grid.add(f"{engine}-{variant}", engines[engine], *settings)
    grid.run(processes=2)
    return grid


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_has_the_losses_and_gradients_of_one_process(curves, engine, variant):
    name = f"{engine}-{variant}"
    assert curves.largest_difference(name, "one") <= 1e-4
    curves.check_gradients(name, "one")
    curves.check_adapter(name, "one")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Grid:
    grid, engines = new_grid(tmp_path_factory.mktemp("pairs"), "combinations", [])
    grid.add("one", "training.micro_batch_size=2")
    grid.run(processes=1)
    for engine in ENGINES:
        grid.add(engine, engines[engine])
    grid.run(processes=2)
    return grid


@pytest.mark.parametrize("engine", ENGINES)
def test_every_pair_of_media_kinds(pairs, engine):
    assert len(pairs.metrics(engine, "loss")) == 17
    assert pairs.largest_difference(engine, "one", steps=16) <= 1e-4
    pairs.check_gradients(engine, "one", steps=16)


@pytest.fixture(scope="module")
def methods(tmp_path_factory) -> Grid:
    """Other adapters, new tokens and packed rows under ZeRO-3."""
    grid, engines = new_grid(tmp_path_factory.mktemp("methods"), "combinations", ["training.max_steps=16"])
    for method, settings in METHODS.items():
        grid.add(f"{method}-one", *settings, "training.micro_batch_size=2")
    grid.run(processes=1)
    for method, settings in METHODS.items():
        grid.add(f"{method}-zero3", *settings, engines["zero3"])
    grid.run(processes=2)
    return grid


@pytest.mark.parametrize("method", METHODS)
def test_every_method_under_zero3(methods, method):
    name, one = f"{method}-zero3", f"{method}-one"
    assert methods.largest_difference(name, one) <= 1e-4
    methods.check_gradients(name, one)
    methods.check_adapter(name, one)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Grid:
    """Other vision encoders, and experts (qwen3_vl_moe)."""
    folder = tmp_path_factory.mktemp("families")
    grid, engines = new_grid(folder, "combinations", ["training.max_steps=16", "model.path=null"])
    for family in FAMILIES:
        model, processor = build(family)
        model.get_output_embeddings().weight.data.mul_(0.1)  # otherwise its loss is so high that steps are skipped
        model.save_pretrained(folder / family)
        processor.save_pretrained(folder / family)
    for family, settings in FAMILIES.items():
        grid.add(f"{family}-one", f"model.path={folder / family}", *settings, "training.micro_batch_size=2")
    grid.run(processes=1)
    for family, settings in FAMILIES.items():
        for engine in ("ddp", "zero3"):
            grid.add(f"{family}-{engine}", f"model.path={folder / family}", *settings, engines[engine])
    grid.run(processes=2)
    return grid


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(families, family, engine):
    name, one = f"{family}-{engine}", f"{family}-one"
    assert families.largest_difference(name, one) <= 1e-4
    families.check_gradients(name, one)
    if family == "qwen3_vl_moe":
        assert any(".experts." in key for key in families.adapter(name))


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Grid:
    """bfloat16 rounds differently for different orders of summation, also between splits of one batch."""
    grid, engines = new_grid(tmp_path_factory.mktemp("half"), "mixed", [*TWENTY, "model.dtype=bfloat16"])
    for engine in ENGINES[1:]:
        grid.add(engine, engines[engine], record=False)
    grid.add("smaller", engines["zero2"], "training.micro_batch_size=2", record=False)
    grid.run(processes=2)
    return grid


@pytest.mark.parametrize("run", [*ENGINES[1:], "smaller"])
def test_bfloat16_differs_only_by_rounding(half, run):
    """Measured: 0.6% between splits at the same stage, 0.8% at stage 3, where each layer multiplies on its own, and 5%
    for an Adam that counts one step too many. After more steps the differences grow to 2.6%."""
    assert half.largest_difference(run, "zero2", steps=12) <= 1e-2
    half.check_adapter(run, "zero2", tolerance=0.5)
