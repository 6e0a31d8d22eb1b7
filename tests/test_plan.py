"""`mmdora plan`: what it computes without numbers is what real steps take."""

from __future__ import annotations

import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import mmdora
from data_pipelines.collator import Collator
from data_pipelines.encoding import Encoded, Encoder
from mmdora.core.config import ModelConfig
from mmdora.core.config_files import load_config
from mmdora.core.deepspeed import read_deepspeed_config
from mmdora.models.loading import load_model, load_shape
from mmdora.planning.activations import Activations, measure
from mmdora.planning.engine_memory import ParallelSetup, memory_with_deepspeed, memory_without_deepspeed, model_sizes
from mmdora.planning.planner import hidden_size, longest_sample, placeholder_sample
from tests.families import FAMILIES
from tests.test_composed import TOWERS
from tests.test_runs import command
from tests.tiny_models import write_language_model

DORA = {"language": {"method": "dora", "rank": 8}, "projector": {"method": "full"}}
METHODS = {
    "dora": DORA,
    "lora with dropout": {"language": {"method": "lora", "rank": 8, "dropout": 0.1}},
    "full": {"language": {"method": "full"}, "lm_head": {"method": "full"}, "projector": {"method": "full"}},
    "vision too": {**DORA, "vision": {"method": "dora", "rank": 4}},
}

QUICK = ("llava", "qwen2_5_vl")  # families whose check is not slow


def tokens(encoded: Encoded, more: int) -> Encoded:
    """The sample, `more` tokens longer: weights of the tiny models shall not be all that there is."""
    per_token = [key for key, value in encoded.items() if value.shape == encoded["input_ids"].shape]
    return encoded | {k: torch.cat([encoded[k], encoded[k][:, -1:].expand(1, more)], 1) for k in per_token}


def taken(model, batch) -> tuple[int, int]:
    """Of a real step: bytes that autograd keeps, each storage once and no weights; and the allocator's peak over what
    there was before it, when weights and optimizer states were already there."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = {}
    held = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *batch.values()]}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in held:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    saved = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    del loss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    changes = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return saved, peak


def states(model) -> int:
    """Bytes of weights, buffers and AdamW's moments after a real step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    return moments + sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def check(model, batch, checkpointed: bool) -> None:
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    saved, peak = taken(model, batch)
    held = states(model)
    planned = measure(model.to("meta"), batch, lambda output: output.loss)
    assert planned.peak_with_gradients == pytest.approx(peak, rel=0.15)
    if not checkpointed:  # else the hooks see what comes between the blocks, and not what is kept of them
        assert planned.saved == pytest.approx(saved, rel=0.15)
    memory = memory_without_deepspeed(model_sizes(model, hidden_size(model)), ParallelSetup(1, 1, 1, 4), planned)
    assert memory.peak == pytest.approx(held + peak, rel=0.15)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family", QUICK)
def test_the_plan_is_what_a_step_takes(family, checkpointed):
    torch.manual_seed(0)
    model, processor = FAMILIES[family].build()
    batch = Collator(0)([tokens(Encoder(processor).encode(placeholder_sample()), 200)] * 4)
    mmdora.inject_adapters(model, DORA)
    check(model, batch, checkpointed)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(QUICK)))
def test_the_plan_is_what_a_step_of_every_family_takes(family, checkpointed):
    test_the_plan_is_what_a_step_takes(family, checkpointed)


@pytest.mark.parametrize(("method", "dtype"), [*((method, "float32") for method in METHODS), ("dora", "bfloat16")])
def test_the_plan_is_what_a_step_of_every_method_takes(tiny, method, dtype):
    model, processor = tiny
    model.to(getattr(torch, dtype))
    example = tokens(Encoder(processor).encode(placeholder_sample()), 300)
    if dtype == "bfloat16":
        example["pixel_values"] = example["pixel_values"].bfloat16()
    mmdora.inject_adapters(model, METHODS[method])
    check(model, Collator(0)([example] * 6), checkpointed=False)


def test_padding_and_its_mask_are_counted(tiny):
    model, processor = tiny
    example = Encoder(processor).encode(placeholder_sample())
    mmdora.inject_adapters(model, DORA)
    check(model, Collator(0)([tokens(example, 200), example, tokens(example, 100)]), checkpointed=False)


def test_a_composed_model_is_planned(tmp_path):
    """With an OpenCLIP tower, whose attention is torch's own until it is adapted."""
    language = write_language_model(tmp_path / "llama", "llama")
    encoder = {"type": "open_clip", "name": "tiny", "model_config": TOWERS["open_clip_vit"][1]}
    config = ModelConfig.model_validate(
        {"vision_encoder": encoder, "language_model": {"path": str(language)}, "dtype": "float32"}
    )
    model, processor = load_model(config)
    batch = Collator(0)([tokens(Encoder(processor).encode(placeholder_sample()), 200)] * 4)
    mmdora.inject_adapters(model, METHODS["vision too"])
    check(model, batch, checkpointed=False)
    assert all(p.is_meta for p in load_shape(config)[0].parameters())


# The command


def planned(capsys, *arguments: str) -> tuple[int, str]:
    code = command("plan", *arguments)
    out = capsys.readouterr()
    return code, out.out + out.err


@pytest.fixture
def small(world) -> list[str]:
    return ["quickstart", f"data.train=[{{path: {world}/counting_held_out.json, format: shapes}}]"]


def test_it_says_what_fits_and_exits_by_it(small, capsys):
    code, out = planned(capsys, *small, "--gpus", "1", "--gpu-memory", "1")
    assert code == 0
    assert "Fits: training.deepspeed=null training.micro_batch_size=16" in out
    for engine in ("none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme"):
        assert re.search(rf"^ ?{engine} .* yes$", out.replace(" \n", "\n"), re.MULTILINE), engine
    code, out = planned(capsys, *small, "--gpus", "2", "--gpu-memory", "1")
    assert "Fits: training.deepspeed=zero2 training.micro_batch_size=8" in out
    code, out = planned(capsys, *small, "--gpus", "1", "--gpu-memory", "0.05")  # 51 MiB
    assert code == 0
    assert re.search(r"micro_batch_size=[1248] ", out)
    assert "training.micro_batch_size=16 does not fit" in out
    code, out = planned(capsys, *small, "--gpus", "1", "--gpu-memory", "0.004")  # less than the weights
    assert code == 1
    assert "Fits under none" in out


def test_a_model_needs_no_weights(tmp_path, capsys):
    """Its config and processor will do, and the data need not be there."""
    model, processor = FAMILIES["llava"].build()
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = [f"model.path={tmp_path}", "model.chat_template=null", "data.train=[nowhere.json]", "data.max_length=99"]
    parts = "parts={language: {method: dora}}"
    code, out = planned(capsys, "quickstart", *settings, parts, "--gpus", "2", "--gpu-memory", "1")
    assert code == 0, out
    assert "8 × 99 tokens" in out


def test_mistakes_are_the_users(small, capsys):
    absent = "data.train=[{path: nowhere.json, format: llava}]"
    for arguments, said in (
        ([small[0], absent, "--gpus", "1", "--gpu-memory", "1"], "set data.max_length"),
        ([*small, "--gpus", "3", "--gpu-memory", "1"], "training.batch_size 16 cannot be split"),
        ([*small, "model.path=nobody/nothing", "--gpus", "1", "--gpu-memory", "1"], "cannot load 'nobody/nothing'"),
        ([*small, "model.quantization=4bit", "--gpus", "1", "--gpu-memory", "1"], "model.quantization"),
        ([*small, "training.deepspeed=zero9", "--gpus", "1", "--gpu-memory", "1"], "no such config 'zero9'"),
        ([*small, "--gpus", "0", "--gpu-memory", "1"], "gpus"),
    ):
        code, out = planned(capsys, *arguments)
        assert code == 2, arguments
        assert said in out


def test_a_sample_is_as_long_as_it_may_be(small, world, tiny):
    config = load_config(*[small[0], [*small[1:], "data.max_length=150"]])
    _, processor = tiny
    example = longest_sample(config, Encoder(processor, max_length=150))
    assert {v.shape[1] for k, v in example.items() if k in ("input_ids", "labels", "attention_mask")} == {150}
    assert 0 < longest_sample(load_config(*[small[0], small[1:]]), Encoder(processor))["input_ids"].shape[1] < 150
    there_is_none = load_config(
        "quickstart", ["data.train=[{path: nowhere.json, format: llava}]", "data.max_length=120"]
    )
    assert longest_sample(there_is_none, Encoder(processor, max_length=120))["input_ids"].shape[1] == 120


def test_settings_change_the_plan(small, capsys):
    """Checkpointing, packing, new tokens, and a JSON of one's own."""

    def kept(*settings: str) -> float:
        code, out = planned(capsys, *small, *settings, "--gpus", "1", "--gpu-memory", "1")
        assert code == 0
        return float(re.search(r"autograd keeps ([\d.]+) MiB", out)[1])

    whole = kept()
    assert kept("training.gradient_checkpointing=true") < 0.7 * whole
    assert kept("training.micro_batch_size=8") == pytest.approx(whole / 2, rel=0.1)
    assert kept("model.new_tokens=[<left>,<right>]") == pytest.approx(whole, rel=0.05)
    assert kept("data.packing=true", "data.max_length=200") > 1.5 * whole


def test_a_json_of_ones_own_has_a_row(small, tmp_path, capsys):
    mine = tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1000}}')
    code, out = planned(capsys, *small, f"training.deepspeed={mine}", "--gpus", "2", "--gpu-memory", "1")
    assert code == 0
    assert "mine.json" in out


# The engines' own terms


@pytest.fixture
def sizes(tiny):
    model, _ = tiny
    mmdora.inject_adapters(model, DORA)
    return model_sizes(model, hidden_size(model))


def test_what_is_shared_among_processes(sizes):
    activations = Activations(0, 0, 0)
    trees = {
        n: read_deepspeed_config(n)[1] for n in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme")
    }
    found = {n: memory_with_deepspeed(sizes, ParallelSetup(4, 4, 1, 4), activations, n, tree) for n, tree in trees.items()}
    alone = memory_without_memory_with_deepspeed(sizes, ParallelSetup(1, 1, 2, 4), activations)
    trained = 4 * sizes.trained_parameters
    assert alone.weights == found["zero1"].weights == found["zero2"].weights
    assert alone.optimizer == 2 * trained
    assert found["zero2"].optimizer == pytest.approx(3 * trained / 4, abs=16)  # with the masters
    assert found["zero2"].gradients == pytest.approx(trained / 4, abs=4)
    assert found["zero1"].gradients > trained
    assert found["zero2_offload"].optimizer == found["zero2_offload"].gradients == 0
    assert found["zero2_offload"].host >= 4 * trained
    small = 4 * sizes.small
    assert found["zero3"].weights == pytest.approx(small + (alone.weights - small) / 4, abs=4)
    assert found["zero3_offload"].weights == found["zero3_nvme"].weights == small
    assert found["zero3_nvme"].disk >= 4 * trained
    assert {found[n].disk for n in found if n != "zero3_nvme"} == {0}


def test_without_deepspeed_a_full_part_of_a_half_precision_model_is_trained_in_fp32():
    model, _ = load_model(ModelConfig(path="assets/tiny-llava", dtype="bfloat16"))
    mmdora.inject_adapters(model, {"projector": {"method": "full"}})
    sizes = model_sizes(model, hidden_size(model))
    assert sizes.trained == 2 * sizes.trained_parameters
    found = memory_without_memory_with_deepspeed(sizes, ParallelSetup(1, 1, 2, 2), Activations(0, 0, 0))
    assert found.weights == sizes.frozen + 4 * sizes.trained_parameters
    assert (found.gradients, found.optimizer) == (4 * sizes.trained_parameters, 8 * sizes.trained_parameters)
    assert found.activations == 2 * sizes.trained_parameters


def test_both_steps_of_a_run_are_looked_at(sizes):
    """Accumulated gradients stand beside all activations; the weights are whole while they are loaded."""
    activations = Activations(100, 1000, 1000 + sizes.trained // 2)
    once, more = (memory_without_memory_with_deepspeed(sizes, ParallelSetup(1, 1, accumulation, 4), activations) for accumulation in (1, 2))
    assert more.peak == sizes.loaded + 3 * sizes.trained + sizes.trained  # the step: moments, gradients, roots
    large = Activations(100, 10 * sizes.trained, 10 * sizes.trained + sizes.trained // 2)
    once, more = (memory_without_memory_with_deepspeed(sizes, ParallelSetup(1, 1, accumulation, 4), large) for accumulation in (1, 2))
    assert more.peak - once.peak == sizes.trained - sizes.trained // 2
    tree, nothing = read_deepspeed_config("zero3_offload")[1], Activations(0, 0, 0)
    parts, whole = (memory_with_deepspeed(sizes, ParallelSetup(1000, 8, 1, 4, before), nothing, "zero3", tree) for before in (False, True))
    assert (parts.loading, whole.loading) == (0, sizes.loaded)  # from the CPU, unless the base is scored first
    assert memory_with_deepspeed(sizes, ParallelSetup(2, 2, 1, 4), nothing, "zero2", read_deepspeed_config("zero2")[1]).loading == sizes.loaded
