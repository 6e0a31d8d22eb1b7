"""Tied embeddings: adapter directories go to PEFT, come from PEFT and are merged without a change of the logits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import mmdora
from mmdora.adapters.save_load import load_weights
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from mmdora.models.new_tokens import token_rows
from mmdora.models.tied_weights import tied_weights
from mmdora.training.optimizer import optimizer_groups
from tests.families import FAMILIES
from tests.tiny_models import write_tokenizer

SHAPE = {
    "vocab_size": 281,  # the tokenizer's size
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
DORA = {"method": "dora", "rank": 2}
FULL = {"method": "full"}
IDS = torch.tensor([[3, 7, 5, 280, 11, 0]])
MAKERS: dict[str, Callable[[bool], PreTrainedModel]] = {
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)),
    "gemma3": lambda tied: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied)
    ),
}


def make(tied: bool, family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return MAKERS[family](tied).eval()


def changed(model: nn.Module) -> nn.Module:
    """Add noise to everything that is trained."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save a merged model and load it with plain transformers."""
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return again.eval()


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gemma3", True)])
@pytest.mark.parametrize("embeddings", [None, FULL, DORA])
@pytest.mark.parametrize("head", [None, FULL, DORA])
def test_peft_computes_what_was_trained(family, head, embeddings, tied, tmp_path):
    """PEFT trains a copy of each module, so a tied weight is written under both names, or it is no longer tied."""
    model = make(tied, family)
    before = logits(model)
    parts = {"lm_head": head, "embeddings": embeddings, "model.layers": DORA}
    mmdora.inject_adapters(model, {part: method for part, method in parts.items() if method})
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
    expected = logits(changed(model))
    mmdora.save_adapter(model, tmp_path / "adapter")
    close(logits(PeftModel.from_pretrained(make(tied, family), tmp_path / "adapter").eval()), expected)
    own = make(tied, family)
    mmdora.load_adapter(own, tmp_path / "adapter")
    close(logits(own), expected)
    merged = mmdora.merge_adapters(own, reversible=True)
    close(logits(merged), expected)
    close(logits(mmdora.unmerge_adapters(merged)), expected)
    mmdora.save_adapter(merged, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    close(logits(reloaded(mmdora.merge_adapters(merged), tmp_path / "merged")), expected)


@pytest.mark.parametrize(("tied", "saves_embeddings"), [(True, "auto"), (True, True), (False, "auto")])
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "targets": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "targets": ["lm_head"]},
        {"targets": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": [40, 7]},
        {"trainable_token_indices": {"lm_head": [40, 7]}},
        {"trainable_token_indices": {"lm_head": [5], "embed_tokens": [40, 7]}},
        {"trainable_token_indices": {"lm_head": [5]}, "modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": {"lm_head": [5]}, "targets": ["embed_tokens"]},
    ],
    ids=str,
)
def test_a_directory_of_pefts_computes_the_same(settings, saves_embeddings, tied, tmp_path):
    """`saves_embeddings` adds the base weights of the embeddings, as PEFT does by itself after a resize."""
    options = dict(settings)
    targets = ["q_proj", *options.pop("targets", [])]
    config = LoraConfig(r=2, target_modules=targets, use_dora=True, **copy.deepcopy(options))
    trained = changed(get_peft_model(make(tied), config))
    expected = logits(trained)
    trained.save_pretrained(tmp_path, save_embedding_layers=saves_embeddings)
    model = make(tied)
    mmdora.load_adapter(model, tmp_path)
    close(logits(model), expected)
    mmdora.save_adapter(model, tmp_path / "own")
    again = make(tied)
    mmdora.load_adapter(again, tmp_path / "own")
    close(logits(again), expected)
    close(logits(PeftModel.from_pretrained(make(tied), tmp_path / "own").eval()), expected)
    close(logits(reloaded(mmdora.merge_adapters(model), tmp_path / "merged")), expected)


def test_peft_embeddings_that_were_resized_are_loaded_and_saved_again(tmp_path):
    """PEFT writes the whole embeddings then, without `modules_to_save`."""
    make(True).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(290)
    trained = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    base.get_input_embeddings().weight.data[281:] = torch.randn(9, 16)
    expected = logits(changed(trained))
    trained.save_pretrained(tmp_path / "adapter")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    with pytest.raises(UserError, match=r"weight has shape \[290, 16\]; this model needs \[281, 16\]"):
        mmdora.load_adapter(model, tmp_path / "adapter")
    for folder in ("adapter", "own"):
        model.resize_token_embeddings(290)
        mmdora.load_adapter(model, tmp_path / folder)
        close(logits(model), expected)
        assert model.lm_head.weight.requires_grad == (folder == "own")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        mmdora.save_adapter(model, tmp_path / "own")
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parts", [{"lm_head": FULL}, {"embeddings": FULL}, {"lm_head": FULL, "embeddings": FULL}, {}])
def test_new_tokens_beside_embeddings_that_are_trained_in_full(parts, tied, tmp_path):
    write_tokenizer(tmp_path)

    def with_tokens() -> PreTrainedModel:
        model = make(tied)
        mmdora.add_tokens(model, AutoTokenizer.from_pretrained(tmp_path), ["<left>", "<right>"])
        return model

    model, ids = with_tokens(), torch.tensor([[3, 281, 5, 282, 11]])
    mmdora.inject_adapters(model, {"model.layers": DORA, **parts})
    expected = logits(changed(model), ids)
    mmdora.save_adapter(model, tmp_path / "adapter")
    own = with_tokens()
    mmdora.load_adapter(own, tmp_path / "adapter")
    close(logits(own, ids), expected)
    resized = make(tied)
    resized.resize_token_embeddings(len(model.get_input_embeddings().weight))
    if parts or tied:  # otherwise the rest of PEFT's resized tables is random
        in_peft = PeftModel.from_pretrained(resized, tmp_path / "adapter").eval()
        close(logits(in_peft, ids)[..., :283], expected[..., :283])
    close(logits(reloaded(mmdora.merge_adapters(own), tmp_path / "merged"), ids), expected)


@pytest.mark.parametrize("part", ["lm_head", "embeddings"])
def test_an_adapter_on_a_table_with_new_tokens_is_refused(part, tmp_path):
    write_tokenizer(tmp_path)
    model = make(True)
    mmdora.add_tokens(model, AutoTokenizer.from_pretrained(tmp_path), ["<left>"])
    with pytest.raises(UserError, match=rf"parts\.{part}: .* holds rows of new tokens"):
        mmdora.inject_adapters(model, {part: DORA})


@pytest.mark.parametrize("name", ["gemma3", "llava"])
@pytest.mark.parametrize("parts", [{"language": FULL}, {"language": FULL, "lm_head": DORA}, {"lm_head": FULL}], ids=str)
def test_the_language_model_of_a_multimodal_model(name, parts, tmp_path):
    """The head is tied to embeddings inside a part that is trained in full."""

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        model = FAMILIES[name].build()[0]
        for config in (model.config, model.config.text_config):
            config.tie_word_embeddings = True
        model.tie_weights()
        return model.eval()

    model = build()
    mmdora.inject_adapters(model, {"vision": DORA, **parts})  # PEFT needs a low-rank layer
    ids = IDS.clamp(max=40)
    expected = logits(changed(model), ids)
    mmdora.save_adapter(model, tmp_path / "adapter")
    close(logits(PeftModel.from_pretrained(build(), tmp_path / "adapter").eval(), ids), expected)
    own = build()
    mmdora.load_adapter(own, tmp_path / "adapter")
    close(logits(own, ids), expected)
    close(logits(reloaded(mmdora.merge_adapters(own), tmp_path / "merged"), ids), expected)


@pytest.mark.parametrize("part", ["lm_head", "model.shared", "model.encoder.embed_tokens"])
@pytest.mark.parametrize("method", [FULL, DORA])
def test_four_tied_tables(part, method, tmp_path):
    """BART holds one weight in the encoder, the decoder, the head and `shared`."""

    def bart() -> PreTrainedModel:
        torch.manual_seed(0)
        layers = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
                  {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()}  # fmt: skip
        config = BartConfig(vocab_size=281, d_model=16, **layers, forced_eos_token_id=None, dropout=0.0)
        return BartForConditionalGeneration(config).eval()

    model = bart()
    mmdora.inject_adapters(model, {part: method, "model.decoder.layers": DORA})
    expected = logits(changed(model))
    mmdora.save_adapter(model, tmp_path / "adapter")
    own = bart()
    mmdora.load_adapter(own, tmp_path / "adapter")
    close(logits(own), expected)
    close(logits(PeftModel.from_pretrained(bart(), tmp_path / "adapter").eval()), expected)
    close(logits(reloaded(mmdora.merge_adapters(own), tmp_path / "merged")), expected)

    write_tokenizer(tmp_path)
    model = bart()
    mmdora.add_tokens(model, AutoTokenizer.from_pretrained(tmp_path), ["<left>"])
    tables = {path for path, _ in token_rows(model)}
    assert tables == {"model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"}
    mmdora.inject_adapters(model, {"model.decoder.layers": DORA})
    expected = logits(changed(model), ids := torch.tensor([[3, 281, 5]]))
    close(logits(reloaded(mmdora.merge_adapters(model), tmp_path / "tokens"), ids), expected)


@pytest.mark.parametrize(
    ("parts", "rate"),
    [
        ("{lm_head: {method: full, learning_rate: 1e-5}}", 1e-5),
        ("{lm_head: {method: full, learning_rate: 1e-5}, embeddings: {method: frozen}}", 1e-5),
        ("{lm_head: {method: full, learning_rate: 1e-5}, model: {method: dora}}", 1e-5),
        ("{lm_head: {method: full, learning_rate: 1e-5}, model.layers: {method: dora}}", 1e-5),
        ("{lm_head: {method: full}, embeddings: {method: full, learning_rate: 1e-4}}", 1e-4),
    ],
)
def test_a_tied_weight_has_the_rate_of_the_part_that_trains_it(parts, rate):
    model, config = make(True), load_config("quickstart", [f"parts={parts}"])
    mmdora.inject_adapters(model, config.parts)
    groups = optimizer_groups(model, config)
    assert [group["lr"] for group in groups for p in group["params"] if p is model.lm_head.weight] == [rate]


def make_old(folder: Path, *dropped: str) -> None:
    """Rewrite a directory as version 0.1.0 would have: a tied weight under one of its names."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["mmdora"])
    assert about.pop("version") == 2
    tensors = {key: t for key, t in load_file(file).items() if key not in [f"base_model.model.{d}" for d in dropped]}
    save_file(tensors, file, metadata={"format": "pt", "mmdora": json.dumps(about)})
    settings = json.loads(config.read_text())
    settings["modules_to_save"] = [m for m in settings["modules_to_save"] if f"{m}.weight" not in dropped]
    config.write_text(json.dumps(settings))


def test_an_old_directory_keeps_weights_tied(tmp_path):
    """It was trained as one weight."""
    model = make(True)
    mmdora.inject_adapters(model, {"lm_head": FULL, "model.layers": DORA})
    expected = logits(changed(model))
    mmdora.save_adapter(model, tmp_path)
    make_old(tmp_path, "model.embed_tokens.weight")
    old = make(True)
    mmdora.load_adapter(old, tmp_path)
    close(logits(old), expected)
    assert old.lm_head.weight is old.model.embed_tokens.weight
    load_weights(model, tmp_path)
    close(logits(model), expected)


def test_an_old_adapter_on_a_weight_that_was_trained_in_full_is_merged_but_not_saved(tmp_path):
    model = make(True)
    mmdora.inject_adapters(model, {"lm_head": DORA, "embeddings": FULL})
    mmdora.save_adapter(changed(model), tmp_path / "adapter")
    model.lm_head.weight = model.model.embed_tokens.weight  # as it was in version 0.1.0
    expected = logits(model)
    make_old(tmp_path / "adapter")
    old = make(True)
    mmdora.load_adapter(old, tmp_path / "adapter")
    close(logits(old), expected)
    with pytest.raises(UserError, match="lm_head has a low-rank adapter, and its weight is tied to one that was"):
        mmdora.save_adapter(old, tmp_path / "again")
    close(logits(reloaded(mmdora.merge_adapters(old), tmp_path / "merged")), expected)


def test_weights_that_a_swap_would_untie_are_refused(tmp_path):
    trained = get_peft_model(
        make(True), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    )
    changed(trained).save_pretrained(tmp_path)
    model = make(True)
    mmdora.inject_adapters(model, {"model.layers": {**DORA, "targets": ["q_proj"]}, "lm_head": FULL})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"holds a tensor of its own for .*, which is tied in this model"):
        mmdora.swap_adapter(model, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert tied_weights(model)


def test_full_weights_of_a_second_adapter_are_refused(tmp_path):
    trained = get_peft_model(make(False), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    changed(trained).save_pretrained(tmp_path)
    model = make(False)
    mmdora.inject_adapters(model, {"model.layers": DORA})
    before = logits(model)
    with pytest.raises(UserError, match="holds weights of lm_head, which the adapter 'default' uses too"):
        mmdora.load_adapter(model, tmp_path, name="b")
    assert torch.equal(logits(model), before)


def test_adapters_of_two_embeddings_that_peft_ties_are_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    changed(get_peft_model(make(True), config)).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"'ensure_weight_tying' is set, and model\.embed_tokens has a low-rank adapter"
    ):
        mmdora.load_adapter(make(True), tmp_path)
