"""`merged_weights`: the adapter is in the weights while a model generates, and they are restored bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import mmdora
from data_pipelines.encoding import Encoder
from eval.run import evaluate, read_questions
from mmdora.adapters import adapter_layers, temporary_merge
from mmdora.core import host_memory
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError
from mmdora.models.new_tokens import put_token_rows, tied_tables
from mmdora.models.quantization import quantize_language_model
from tests.test_norms import counted_norms

DORA = {"method": "dora", "rank": 4, "alpha": 8, "dropout": 0.1}
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEAD = {"targets": ["lm_head"]}


class Net(nn.Module):
    """An embedding, an `nn.MultiheadAttention`, a grouped convolution and linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 40, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.down(F.gelu(self.up(self.conv(x.mT).mT)))


def language_model(family: str, **settings) -> nn.Module:
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(SMALL | settings)))


EVERY_KIND = ["embed", "conv", "up", "down", "attention.q_proj", "attention.v_proj", "attention.out_proj"]
# A function that makes a model, the parts of its adapter, and tokens to add.
CASES = {
    "every kind of layer": (Net, {"": DORA | {"targets": EVERY_KIND, "dropout": 0.0}}, []),
    "a tied head": (lambda: language_model("llama", tie_word_embeddings=True), {"": DORA | HEAD}, []),
    "tied embeddings": (
        lambda: language_model("gemma", tie_word_embeddings=True),
        {"embeddings": {"method": "dora", "rank": 4}},
        [],
    ),
    "both of two tied tables": (
        lambda: language_model("llama", tie_word_embeddings=True),
        {"embeddings": {"method": "lora", "rank": 4}, "lm_head": DORA, "language": DORA},
        [],
    ),
    "scaled embeddings": (
        lambda: language_model("gemma3_text", query_pre_attn_scalar=8),
        {"embeddings": {"method": "dora", "rank": 4}, "language": {"method": "dvora", "rank": 4}},
        [],
    ),
    "transposed weights": (
        lambda: language_model("gpt2", n_embd=16, n_layer=2, n_head=2),
        {"language": DORA | {"magnitude_targets": ["c_proj"]}},
        [],
    ),
    "experts": (
        lambda: language_model("mixtral", **EXPERTS),
        {"": DORA | {"dropout": 0.0, "targets": ["experts.gate_up_proj", "experts.down_proj", "q_proj"]}},
        [],
    ),
    "a part in full and new tokens": (
        lambda: language_model("llama", tie_word_embeddings=True),
        {"model.layers.0": {"method": "full"}, "model.layers.1": {"method": "magnitude"}},
        [37, 38],
    ),
}


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "vera_lambda" in name or "trainable_tokens" in name or parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def adapted(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    make, parts, rows = CASES[case]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    if rows:
        table = model.get_input_embeddings()
        put_token_rows(model, "model.embed_tokens", rows, table.weight[rows])
        for tied in tied_tables(model, "model.embed_tokens"):
            put_token_rows(model, tied, shared=table.get_submodule("token_adapter"))
    mmdora.inject_adapters(model, parts)
    randomize(model)
    return model


def llama() -> nn.Module:
    """A small language model with an adapter on its linear layers, and one on its tied head."""
    return adapted("both of two tied tables")


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that after the block the model is what it was: parameters, their contents, ties, and its output."""
    objects = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    before, output, active = contents(model), logits(model), [layer.active for _, layer in adapter_layers(model)]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    try:
        yield
    finally:
        assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == objects
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert [layer.active for _, layer in adapter_layers(model)] == active
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
        assert torch.equal(logits(model), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_it_computes_with_the_merged_models_weights(case, dtype):
    """With exactly those that `mmdora merge` writes."""
    model = adapted(case, dtype)
    twin = copy.deepcopy(model)
    layers = [path for path, _ in adapter_layers(model)]
    live, merged = logits(model), mmdora.merge_adapters(twin)
    with unchanged(model):
        with mmdora.merged_weights(model) as how:
            assert how == "merged"
            for path in layers:
                if not path.startswith("attention."):  # one `in_proj_weight` in the merged model
                    holder, _, leaf = path.rpartition(".")
                    inside, outside = (m.get_submodule(holder)._parameters.get(leaf) for m in (model, merged))
                    if inside is None:
                        inside, outside = model.get_submodule(path).weight, merged.get_submodule(path).weight
                    assert torch.equal(inside, outside), path
            output = logits(model)
        if dtype == torch.float32:
            torch.testing.assert_close(output, live, atol=1e-4, rtol=1e-4)
        if case not in ("every kind of layer", "a part in full and new tokens"):  # which compute in another order
            assert torch.equal(output, logits(merged))
        else:
            torch.testing.assert_close(output, logits(merged))
    model.train()
    loss = model(torch.randint(0, 40, (2, 7)))
    (loss if isinstance(loss, torch.Tensor) else loss.logits).float().square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "embed" not in name)


def test_an_adapted_head_leaves_the_embeddings_it_is_tied_to():
    model, ids = adapted("a tied head"), torch.arange(40)
    embeddings = model.model.embed_tokens(ids)
    with unchanged(model), mmdora.merged_weights(model):
        assert torch.equal(model.model.embed_tokens(ids), embeddings)
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_weights_that_share_memory_under_two_parameters_count_as_tied():
    torch.manual_seed(0)
    net = nn.ModuleDict({"one": nn.Linear(6, 6), "two": nn.Linear(6, 6)})
    net.two.weight = nn.Parameter(net.one.weight.data)
    mmdora.inject_adapters(net, {"one": {"method": "dora", "rank": 2}})
    randomize(net)
    before = net.two.weight.clone()
    with mmdora.merged_weights(net):
        assert torch.equal(net.two.weight, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_the_block_restores_the_weights(error):
    model = llama()
    with unchanged(model), pytest.raises(error), mmdora.merged_weights(model):
        raise error


@pytest.mark.parametrize("step", ["merged_weight", "restore"])
def test_ctrl_c_while_weights_are_merged_or_restored(step, monkeypatch):
    """Whatever layer it meets."""
    owner = temporary_merge.AdapterLayer if step == "merged_weight" else temporary_merge._Replaced
    original, model = getattr(owner, step), llama()
    calls = []

    def interrupted(self, *args):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    with unchanged(model):
        monkeypatch.setattr(owner, step, interrupted)
        with pytest.raises(KeyboardInterrupt), mmdora.merged_weights(model):
            pass
        monkeypatch.undo()
    assert len(calls) >= 3
    mmdora.set_adapter(model, "default")  # which the block forbids


def test_blocks_nest():
    model = llama()
    with unchanged(model):
        with mmdora.merged_weights(model):
            inside = logits(model)
            with mmdora.merged_weights(model, memory=0) as how:
                assert how == "merged"
                assert torch.equal(logits(model), inside)
            assert torch.equal(logits(model), inside)
        live = logits(model)
    assert not torch.equal(inside, live)
    with mmdora.disable_adapters(model):
        base = logits(model)
        with mmdora.merged_weights(model) as how:  # nothing is active
            assert how is None
            assert torch.equal(logits(model), base)


def test_without_an_adapter_nothing_is_merged():
    model = language_model("llama").eval()
    before = logits(model)
    with mmdora.merged_weights(model) as how:
        assert how is None
        assert torch.equal(logits(model), before)


def test_adapters_cannot_change_inside_the_block(tmp_path):
    model = llama()
    with unchanged(model), mmdora.merged_weights(model):
        for change in (
            lambda: mmdora.set_adapter(model, "default"),
            lambda: mmdora.merge_adapters(model),
            lambda: mmdora.save_adapter(model, tmp_path / "out"),
            lambda: mmdora.load_adapter(model, tmp_path / "out", name="b"),
            lambda: mmdora.inject_adapters(model, {"language": DORA}, name="b"),
            lambda: mmdora.combine_adapters(model, {"default": 0.5}, "half"),
            lambda: mmdora.export_lora(model, tmp_path / "out", rank=2),
            lambda: mmdora.disable_adapters(model).__enter__(),
            lambda: mmdora.adapters_by_row(model, ["default", None]).__enter__(),
        ):
            with pytest.raises(UserError, match="inside merged_weights, adapters cannot be changed"):
                change()
    assert not list(tmp_path.iterdir())


def test_no_gradient_is_computed_inside_the_block():
    """A backward pass would reach no adapter."""
    model = llama().train()
    with mmdora.merged_weights(model):
        assert not model(torch.tensor([[3, 4]])).logits.requires_grad
    assert model(torch.tensor([[3, 4]])).logits.requires_grad


def test_each_of_several_adapters_is_merged_when_it_is_active():
    model = llama()
    mmdora.inject_adapters(model, {"language": {"method": "lora", "rank": 2}}, name="b")
    randomize(model)
    outputs = {}
    for name in ("default", "b"):
        mmdora.set_adapter(model, name)
        live = logits(model)
        with unchanged(model), mmdora.merged_weights(model):
            outputs[name] = logits(model)
        torch.testing.assert_close(outputs[name], live, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs["default"], outputs["b"], atol=1e-2)


def test_a_mixed_batch_keeps_its_adapters_separate():
    model = llama()
    with unchanged(model), mmdora.adapters_by_row(model, ["default", None]):
        by_row = logits(model)
        with mmdora.merged_weights(model) as how:
            assert how == "separate: the rows of a batch use different adapters"
            assert torch.equal(logits(model), by_row)


def test_an_adapter_that_does_not_fit_stays_separate_with_its_norms_computed_once(caplog):
    model = llama()
    needed = sum(layer.weight.nbytes for _, layer in adapter_layers(model)) / 2**30
    with mmdora.merged_weights(model, memory=1.001 * needed) as how:
        assert how == "merged"
    with unchanged(model), mmdora.merged_weights(model, memory=0.999 * needed) as how:
        assert how.startswith("separate: a copy of the adapted weights takes")
        with counted_norms() as first:
            logits(model)
        with counted_norms() as second:
            live = logits(model)
    assert first
    assert not second
    assert "generating without merging the adapter" in caplog.text
    torch.testing.assert_close(live, logits(model))


def test_a_device_without_memory_keeps_the_adapter_separate(monkeypatch):
    model, merged_weight, calls = llama(), temporary_merge.AdapterLayer.merged_weight, []

    def full(self, name):
        calls.append(self)
        if len(calls) == 4:
            raise torch.OutOfMemoryError
        return merged_weight(self, name)

    with unchanged(model):
        monkeypatch.setattr(temporary_merge.AdapterLayer, "merged_weight", full)
        with mmdora.merged_weights(model) as how:
            assert how == "separate: cpu has no memory left to merge the adapter"
            assert all(layer.active == "default" for _, layer in adapter_layers(model))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_model_keeps_its_adapter_separate(bits, tiny):
    pytest.importorskip("bitsandbytes")
    model, _ = tiny
    quantize_language_model(model, bits)
    mmdora.inject_adapters(model, {"language": DORA, "vision": DORA})
    with mmdora.merged_weights(model) as how:
        assert how.startswith("separate: the weight of model.language_model.layers.0")
        assert how.endswith("is quantized")


def test_offloaded_weights_keep_the_adapter_separate():
    model = llama().to("meta")
    with mmdora.merged_weights(model) as how:
        assert how.endswith("is offloaded")


def test_autocast_does_not_make_the_weights_less_exact():
    model = llama()
    with mmdora.merged_weights(model):
        expected = contents(model)
    with torch.autocast("cpu", torch.bfloat16), mmdora.merged_weights(model):
        assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
        merged = mmdora.merge_adapters(copy.deepcopy(llama()))
    assert torch.equal(merged.lm_head.weight, expected["lm_head.weight"])


def test_compiled_code_computes_with_the_merged_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    mmdora.inject_adapters(net, {"": DORA})
    randomize(net)
    compiled, x = torch.compile(net, backend="eager"), torch.randn(3, 6)
    with torch.no_grad():
        live = compiled(x)
        with mmdora.merged_weights(net):
            assert torch.equal(compiled(x), net(x))
        assert torch.equal(compiled(x), live)


def test_available_memory_is_bounded_by_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    free = host_memory.available_memory()
    assert free > 0
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 500000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available_memory() == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("4000000\n")
    assert host_memory.available_memory() == 1_500_000
    (tmp_path / "memory.max").write_text("2000000\n")
    assert host_memory.available_memory() == 0


@pytest.fixture
def questions(tmp_path) -> Path:
    turns = [{"from": "human", "value": "What color is the circle?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": f"q{i}", "conversations": turns} for i in range(3)]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    return tmp_path / "questions.json"


@pytest.mark.parametrize("memory", [None, 0.0])
def test_the_receipt_says_how_the_adapter_was_computed(memory, tiny, questions, tmp_path):
    """The answers are the merged model's."""
    model, processor = tiny
    entry = EvaluationConfig(name="small", benchmark="vqa", data=str(questions), max_new_tokens=6)
    common = (Encoder(processor), entry, read_questions(entry))
    plain = evaluate(model, *common, tmp_path / "plain")
    assert "adapter_weights" not in plain["receipt"]
    mmdora.inject_adapters(model, {"language": DORA, "vision": DORA, "projector": DORA})
    randomize(model)
    before = contents(model)
    report = evaluate(model, *common, tmp_path / "adapted", merge_memory=memory)
    assert report["receipt"]["adapter_weights"].partition(":")[0] == ("merged" if memory is None else "separate")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    again = evaluate(model, *common, tmp_path / "adapted")  # a finished result, whichever way it was computed
    assert again == report
    evaluate(mmdora.merge_adapters(model), *common, tmp_path / "merged")
    answers = [
        [json.loads(line)["response"] for line in (tmp_path / name / "responses.jsonl").open()]
        for name in ("plain", "adapted", "merged")
    ]
    assert answers[1] == answers[2] != answers[0]
