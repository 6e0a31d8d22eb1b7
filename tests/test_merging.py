"""Several adapters on one model: switch, swap, use one per row, combine; merge and unmerge; export as LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import mmdora
from mmdora.adapters import adapter_layers
from mmdora.core.errors import UserError

DORA = {"method": "dora", "rank": 4, "alpha": 8}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 6, bias=False)

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        return self.down(F.gelu(self.up(x)))


ALL = {"targets": ["embed", "conv", "up", "down"]}


def randomize(model: nn.Module, name: str) -> None:
    for key, parameter in model.named_parameters():
        if "lora_" in key and key.endswith(f".{name}"):
            parameter.data += 0.1 * torch.randn_like(parameter)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in mmdora.merge_adapters(copy.deepcopy(model)).named_parameters()}


@pytest.fixture
def several() -> Net:
    """Adapters `a` (DoRA), `b` (LoRA on some layers, DoRA on others) and `c` (DoRA of another rank)."""
    net = Net()
    mmdora.inject_adapters(net, {"": DORA | ALL}, name="a")
    mmdora.inject_adapters(
        net, {"": DORA | {"rank": 2, "targets": ["up", "conv"], "magnitude_targets": ["conv", "down"]}}, name="b"
    )
    mmdora.inject_adapters(net, {"": DORA | ALL | {"rank": 3}}, name="c")
    for name in "abc":
        randomize(net, name)
    return net


def test_the_active_adapter_is_the_one_that_is_trained(several):
    for name in "abc":
        mmdora.set_adapter(several, name)
        trained = {n.rpartition(".")[2] for n, p in several.named_parameters() if p.requires_grad}
        assert trained == {name}


def test_each_row_of_a_batch_uses_its_own_adapter(several):
    ids = torch.randint(0, 30, (5, 7))
    names = ["a", None, "b", "a", "c"]
    expected = []
    for row, name in zip(ids, names, strict=True):
        if name is None:
            with mmdora.disable_adapters(several):
                expected.append(several(row[None]))
        else:
            mmdora.set_adapter(several, name)
            expected.append(several(row[None]))
    mmdora.set_adapter(several, "c")
    with mmdora.adapters_by_row(several, names):
        out = several(ids)
        with pytest.raises(ValueError, match="names 5 adapters, but the batch has 4 rows"):
            several(ids[:4])
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(several(ids[4:]), expected[4], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="no adapter 'd'"), mmdora.adapters_by_row(several, ["a", "d"]):
        pass


def test_contexts_nest(several):
    ids = torch.randint(0, 30, (2, 5))
    mmdora.set_adapter(several, "c")
    with mmdora.adapters_by_row(several, ["a", "b"]):
        by_row = several(ids)
        with mmdora.adapters_by_row(several, ["b", "a"]):
            assert not torch.equal(several(ids), by_row)
        with mmdora.disable_adapters(several):
            torch.testing.assert_close(several(ids), Net()(ids))
        assert torch.equal(several(ids), by_row)


def test_images_need_adapters_by_row_too(tiny):
    model, _ = tiny
    mmdora.inject_adapters(model, {"vision": DORA, "language": DORA})
    with pytest.raises(UserError, match="name the adapter of every image too"):  # noqa: SIM117
        with mmdora.adapters_by_row(model, ["default", None]):
            pass
    with mmdora.adapters_by_row(model, ["default", None], media=["default"]):
        assert model.model.language_model.layers[0].self_attn.q_proj.row_adapters == ["default", None]
        assert {len(layer.row_adapters) for path, layer in adapter_layers(model) if "vision" in path} == {1}
    assert all(layer.row_adapters is None for _, layer in adapter_layers(model))


def test_a_combined_adapter_equals_the_weighted_sum(several):
    factors = {"a": 0.7, "b": -0.4, "c": 0.25}
    with mmdora.disable_adapters(several):
        base = weights(several)
    alone = {}
    for name in factors:
        mmdora.set_adapter(several, name)
        alone[name] = weights(several)
    mmdora.combine_adapters(several, factors, "sum")
    assert several.up.specs["sum"].rank == 9
    combined = weights(several)
    for key, weight in combined.items():
        expected = base[key].double() + sum(w * (alone[n][key].double() - base[key]) for n, w in factors.items())
        error = (weight.double() - expected).norm() / (expected - base[key].double()).norm().clamp_min(1e-9)
        assert error < 1e-5, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_combined_adapter_in_half_precision(several, dtype):
    """The weights W' of the sum before they are rounded to the weights' dtype."""
    for parameter in several.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
    factors = {"a": 0.7, "c": 0.25}
    mmdora.combine_adapters(several, factors, "sum")
    for path, layer in adapter_layers(several):
        base = layer.matrix().double()
        expected = base.clone()
        for name, factor in factors.items():
            a, b = (t.double() for t in layer.factors(name))
            v = base + layer.specs[name].scale * b @ a
            expected += factor * (layer.magnitude(name).double()[:, None] * v / v.norm(dim=1, keepdim=True) - base)
        error = (layer.merged("sum").double() - expected).norm() / expected.norm()
        assert error < 1e-6, path


def test_a_sum_in_which_a_row_vanishes_is_refused():
    net = Net()
    for name in "ab":
        mmdora.inject_adapters(net, {"up": DORA}, name=name)
        net.up.lora_magnitude_vector[name].data *= 0.5
    with pytest.raises(UserError, match="up: with the weights"):
        mmdora.combine_adapters(net, {"a": 1.0, "b": 1.0}, "sum")
    assert set(net.up.specs) == {"a", "b"}


@pytest.mark.parametrize("rank", [4, 7])
def test_a_swap_replaces_tensors_rank_and_scale(rank, tmp_path):
    """Parameters whose shapes agree are kept."""
    ids = torch.randint(0, 30, (2, 5))
    other = Net()
    mmdora.inject_adapters(other, {"": DORA | ALL | {"rank": rank, "alpha": 5}})
    randomize(other, "default")
    mmdora.save_adapter(other, tmp_path)
    net = Net()
    mmdora.inject_adapters(net, {"": DORA | ALL})
    before = net.up.lora_A["default"]
    mmdora.swap_adapter(net, tmp_path)
    assert (net.up.lora_A["default"] is before) == (rank == 4)
    assert torch.equal(net(ids), other(ids))
    assert all(p.requires_grad == ("lora_" in n) for n, p in net.named_parameters())
    narrow = Net()
    mmdora.inject_adapters(narrow, {"up": DORA})
    with pytest.raises(UserError, match="conv is adapted in only one of the two"):
        mmdora.swap_adapter(narrow, tmp_path)


def test_a_swap_reaches_compiled_code(tmp_path):
    net, ids = Net(), torch.randint(0, 30, (2, 5))
    mmdora.inject_adapters(net, {"": DORA | {"targets": ["up", "down"]}})
    randomize(net, "default")
    mmdora.save_adapter(net, tmp_path)
    expected = net(ids)
    compiled = torch.compile(net, backend="aot_eager")
    randomize(net, "default")
    assert not torch.allclose(compiled(ids), expected)
    mmdora.swap_adapter(net, tmp_path)
    torch.testing.assert_close(compiled(ids), expected)


def test_unmerging_is_exact(several):
    ids = torch.randint(0, 30, (2, 5))
    several.to(torch.bfloat16)
    mmdora.set_adapter(several, "a")
    before, state = several(ids), {k: v.clone() for k, v in several.state_dict().items()}
    merged = mmdora.merge_adapters(several, reversible=True)
    assert not list(adapter_layers(merged))
    assert not torch.equal(merged.up.weight, state["up.weight"])
    back = mmdora.unmerge_adapters(merged)
    assert all(torch.equal(v, state[k]) for k, v in back.state_dict().items())
    assert torch.equal(back(ids), before)
    mmdora.set_adapter(back, "b")
    with pytest.raises(UserError, match="nothing to unmerge"):
        mmdora.unmerge_adapters(back)
    mmdora.merge_adapters(back.train(), reversible=True)
    with pytest.raises(UserError, match="merged already"):
        mmdora.merge_adapters(back, reversible=True)
    back.eval()
    assert not any(module.training for module in mmdora.unmerge_adapters(back).modules())


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens"])
def test_merging_one_of_two_tied_embeddings_unties_them(part, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(0, 30, (1, 6))
    parent, _, leaf = part.rpartition(".")
    mmdora.inject_adapters(model, {parent: DORA | {"targets": [leaf]}})
    randomize(model, "default")
    expected = model(ids).logits
    merged = mmdora.merge_adapters(model, reversible=True)
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=1e-5)
    mmdora.unmerge_adapters(merged)
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_second_adapter_beside_weights_trained_in_full_is_refused():
    net = Net()
    mmdora.inject_adapters(net, {"up": DORA, "down": {"method": "full"}})
    with pytest.raises(UserError, match="'default' trains weights of the base model"):
        mmdora.inject_adapters(net, {"up": DORA}, name="b")
    other = Net()
    mmdora.inject_adapters(other, {"up": DORA})
    with pytest.raises(UserError, match="the adapter 'default' uses the same base weights"):
        mmdora.inject_adapters(other, {"down": {"method": "full"}}, name="b")


def test_export_as_lora_reports_its_error(tmp_path):
    ids = torch.randint(0, 30, (2, 5))
    net = Net()
    targets = {"targets": ["embed", "up", "down"]}
    mmdora.inject_adapters(net, {"": DORA | targets})
    randomize(net, "default")
    out = net(ids)
    full = mmdora.export_lora(net, tmp_path / "full", rank=12)
    assert full.error < 1e-5
    in_peft = PeftModel.from_pretrained(Net(), tmp_path / "full")
    assert not in_peft.peft_config["default"].use_dora
    torch.testing.assert_close(in_peft(ids), out, atol=1e-4, rtol=1e-4)

    rough = mmdora.export_lora(net, tmp_path / "rough", rank=2)
    assert set(rough.errors) == {"embed", "up", "down"}
    assert 0.05 < rough.error < 1
    base, exact, loaded = Net(), weights(net), Net()
    mmdora.load_adapter(loaded, tmp_path / "rough")
    approximate = weights(loaded)
    for path, error in rough.errors.items():
        before, after = (dict(base.named_parameters())[f"{path}.weight"], exact[f"{path}.weight"])
        missed = (approximate[f"{path}.weight"] - after).norm() / (after - before).norm()
        assert missed.item() == pytest.approx(error, rel=1e-3)
    with pytest.raises(UserError, match="the rank must be at least 1"):
        mmdora.export_lora(net, tmp_path / "none", rank=0)
    mmdora.inject_adapters(wide := Net(), {"": DORA | ALL})
    with pytest.raises(UserError, match="conv: PEFT has no plain LoRA"):
        mmdora.export_lora(wide, tmp_path / "wide", rank=2)


@pytest.mark.parametrize("shape", [(30, 20), (1100, 1300)])
def test_the_exported_lora_is_the_best_of_its_rank(shape, tmp_path):
    """The error is that of the truncated SVD, also for matrices so large that a randomized SVD is used."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    mmdora.inject_adapters(net, {"": {"method": "lora", "rank": 20, "alpha": 20}})
    net[0].lora_B["default"].data = torch.randn(shape[0], 20) * 0.8 ** torch.arange(20)
    change = net[0].merged("default") - net[0].weight
    export = mmdora.export_lora(net, tmp_path, rank=8)
    best = torch.linalg.svdvals(change)[8:].norm() / change.norm()
    assert best > 0.05
    assert export.error <= 1.01 * best
