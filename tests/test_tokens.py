"""New tokens: only their rows are trained; adapter directories, merged models and PEFT keep them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import mmdora
from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text
from mmdora.apps.load_target import load_target
from mmdora.core.config import ModelConfig, VideoConfig
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from mmdora.models.architectures import find_parts
from mmdora.models.loading import load_model, save_model
from mmdora.models.new_tokens import token_rows
from mmdora.training.optimizer import optimizer_groups
from tests.media import write_image
from tests.tiny_models import write_tokenizer

TOKENS = ["<left>", "<right>"]
SHAPE = {
    "vocab_size": 281,  # the tokenizer's size, so the tables have no free rows
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
}
DORA = {"method": "dora", "rank": 2}
QV = {"": {**DORA, "targets": ["q_proj", "v_proj"]}}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def make(kind: str = "untied"):
    torch.manual_seed(0)
    if kind == "room":  # the table is larger than the vocabulary, as in many models
        return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 300})).eval()
    if kind == "phi":  # its head has a bias
        return PhiForCausalLM(PhiConfig(**SHAPE)).eval()
    if kind == "gemma":  # tied, and its embeddings are scaled
        return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=8)).eval()
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=kind == "tied")).eval()


KINDS = ["untied", "tied", "phi", "gemma"]


def trained(model, ids: list[int], steps: int = 3):
    """Train a few large steps on sequences with the new tokens as input and as label."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    batch = torch.tensor([[5, ids[0], 6, ids[1], 7], [ids[1], 8, 9, ids[0], ids[0]]])
    for _ in range(steps):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return batch


@torch.no_grad()
def logits(model, batch):
    return model.eval()(input_ids=batch).logits


@pytest.mark.parametrize("kind", [*KINDS, "room"])
def test_a_token_starts_as_the_mean_of_its_pieces(kind, tokenizer):
    model = make(kind)
    before = copy.deepcopy(model)
    pieces = tokenizer("<left>", add_special_tokens=False)["input_ids"]
    ids = mmdora.add_tokens(model, tokenizer, TOKENS)
    assert tokenizer("<left> a <right>", add_special_tokens=False)["input_ids"][0] == ids[0]
    assert tokenizer.decode([ids[0], ids[1]], skip_special_tokens=True) == "<left><right>"
    assert ids == tokenizer.convert_tokens_to_ids(TOKENS)
    first, mean = before.get_input_embeddings().weight, model.get_input_embeddings().weight[ids[0]]
    assert torch.allclose(mean, first[pieces].mean(0))
    batch = torch.tensor([[5, 6, 7, 8]])
    known = len(before.get_input_embeddings().weight)
    now = logits(model, batch)
    assert torch.allclose(now[..., : min(ids)], logits(before, batch)[..., : min(ids)], atol=1e-6)
    head = before.get_output_embeddings()
    expected = logits(before, batch)[..., pieces].mean(-1)
    assert torch.allclose(now[..., ids[0]], expected, atol=1e-5), head
    assert now.shape[-1] == known if kind == "room" else now.shape[-1] == 320  # padded to a multiple of 64


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_row_is_that_of_full_training(kind, tokenizer):
    """Other rows get no gradient."""
    model = make(kind)
    ids = mmdora.add_tokens(model, tokenizer, TOKENS)
    full = copy.deepcopy(model)
    report = mmdora.inject_adapters(model, QV)
    rows = dict(token_rows(model))
    tied = kind in ("tied", "gemma")
    assert len({id(r) for r in rows.values()}) == (1 if tied else 2)
    part = next(part for part in report.parts if part.name == "new tokens")
    assert part.trainable == (1 if tied else 2) * 2 * 32
    batch = torch.tensor([[5, ids[0], 6, ids[1], 7], [ids[1], 8, 9, ids[0], ids[0]]])
    model(input_ids=batch, labels=batch).loss.backward()
    assert model.get_input_embeddings().weight.grad is None
    mmdora.inject_adapters(
        full,
        {"embeddings": {"method": "full"}, "lm_head": {"method": "full"}}
        if not tied
        else {"embeddings": {"method": "full"}},
    )
    assert list(token_rows(full)) == []  # full training trains all rows of the tables
    full(input_ids=batch, labels=batch).loss.backward()
    for table in ("input", "output"):
        gradient = getattr(model, f"get_{table}_embeddings")().token_adapter.trainable_tokens_delta.grad
        expected = getattr(full, f"get_{table}_embeddings")().weight.grad[ids]
        assert torch.allclose(gradient, expected, atol=1e-6)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_merged_models_and_peft_keep_the_rows(kind, tokenizer, tmp_path):
    model = make(kind)
    ids = mmdora.add_tokens(model, tokenizer, TOKENS)
    mmdora.inject_adapters(model, QV)
    batch = trained(model, ids)
    expected = logits(model, batch)
    mmdora.save_adapter(model, tmp_path)

    again = make(kind)
    with pytest.raises(UserError, match=r"<left>, <right>.*model.new_tokens"):
        mmdora.load_adapter(again, tmp_path)
    fresh = copy.deepcopy(again)
    mmdora.add_tokens(again, AutoTokenizer.from_pretrained(new_tokenizer_folder(tmp_path)), TOKENS)
    mmdora.load_adapter(again, tmp_path)
    assert torch.allclose(logits(again, batch), expected, atol=1e-6)

    fresh.resize_token_embeddings(len(model.get_input_embeddings().weight))  # as PEFT's users do
    peft_model = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.allclose(logits(peft_model, batch)[..., : max(ids) + 1], expected[..., : max(ids) + 1], atol=1e-5)

    merged = mmdora.merge_adapters(again, reversible=True)
    assert list(token_rows(merged)) == []
    assert torch.allclose(logits(merged, batch), expected, atol=1e-5)
    mmdora.unmerge_adapters(merged)
    assert torch.equal(logits(again, batch), logits(merged, batch))
    assert torch.allclose(logits(merged, batch), expected, atol=1e-6)
    merged = mmdora.merge_adapters(merged)
    merged.save_pretrained(tmp_path / "merged")
    plain = type(model).from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(plain, batch), expected, atol=1e-5)


def new_tokenizer_folder(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_directory_of_pefts_with_trained_tokens_loads(tied, tmp_path):
    """The tokens are in the vocabulary already, and `trainable_token_indices` is an unsorted list."""
    from peft import LoraConfig, get_peft_model

    kind = "tied" if tied else "untied"
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, trainable_token_indices=[40, 7])
    peft_model = get_peft_model(make(kind), config)
    batch = trained(peft_model, [7, 40])
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    model = make(kind)
    mmdora.load_adapter(model, tmp_path)
    assert torch.allclose(logits(model, batch), logits(peft_model, batch), atol=1e-5)
    other = make(kind)
    mmdora.load_adapter(other, tmp_path)
    trained(model, [7, 40])
    mmdora.save_adapter(model, tmp_path / "again")
    mmdora.swap_adapter(other, tmp_path / "again")
    assert torch.equal(logits(other, batch), logits(model, batch))


def test_rows_that_do_not_fit_are_refused_and_change_nothing(tokenizer, tmp_path):
    model = make()
    ids = mmdora.add_tokens(model, tokenizer, TOKENS)
    mmdora.inject_adapters(model, QV)
    mmdora.save_adapter(model, tmp_path)
    tensors, config = load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_config.json"
    other = make()
    mmdora.add_tokens(
        other, AutoTokenizer.from_pretrained(new_tokenizer_folder(tmp_path)), ["<up>", "<down>", "<left>"]
    )
    with pytest.raises(UserError, match="which this model does not have"):
        mmdora.load_adapter(other, tmp_path)
    about = json.loads(config.read_text())
    assert about["trainable_token_indices"] == {"model.embed_tokens": ids, "lm_head": ids}
    about["trainable_token_indices"]["lm_head"] = ids[:1]
    config.write_text(json.dumps(about))
    with pytest.raises(UserError, match="'trainable_token_indices' names 1 tokens"):
        mmdora.load_adapter(other, tmp_path)
    about["trainable_token_indices"]["lm_head"] = [3, "x"]
    config.write_text(json.dumps(about))
    with pytest.raises(UserError, match="trainable_token_indices"):
        mmdora.load_adapter(other, tmp_path)
    about["trainable_token_indices"] = {"embed_tokens": ids, "lm_head": ids}
    config.write_text(json.dumps(about))
    narrow = {k: v[:, :8].contiguous() if "lm_head" in k else v for k, v in tensors.items()}
    save_file(narrow, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="rows of 8 numbers; this model needs 32"):
        mmdora.load_adapter(make(), tmp_path)
    assert not any("lora" in name for name, _ in other.named_parameters())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["<a>", "<a>"], "<a>' is in the vocabulary already"), (["</s>"], "vocabulary already"), ([" "], "blank")],
)
def test_a_blank_or_known_token_is_refused(tokens, message, tokenizer):
    with pytest.raises(UserError, match=message):
        mmdora.add_tokens(make(), tokenizer, tokens)


def test_a_second_adapter_that_would_change_the_rows_is_refused(tokenizer):
    model = make()
    mmdora.add_tokens(model, tokenizer, TOKENS)
    with pytest.raises(UserError, match=r"lm_head holds rows of new tokens"):
        mmdora.inject_adapters(model, {"lm_head": {**DORA, "targets": "all-linear"}})
    mmdora.inject_adapters(model, QV)
    with pytest.raises(UserError, match="trains weights of the base model"):
        mmdora.inject_adapters(model, QV, name="second")


def test_embeddings_belong_to_language_unless_they_are_a_part(tiny):
    model, _ = tiny
    table = model.get_input_embeddings()
    alone = find_parts(model, ["language"])["language"]
    assert any(p is table.weight for _, p in alone.named_parameters(model))
    report = mmdora.inject_adapters(model, {"language": {"method": "full"}, "embeddings": {"method": "frozen"}})
    assert not table.weight.requires_grad
    assert next(p for p in report.parts if p.name == "language").trainable > 0
    assert next(p for p in report.parts if p.name == "embeddings").trainable == 0
    assert all(p.requires_grad for n, p in model.named_parameters() if ".language_model.layers." in n)


def test_embeddings_have_their_own_learning_rate(tiny):
    model, _ = tiny
    config = load_config("quickstart", ["parts.embeddings={method: full, learning_rate: 1e-4}"])
    mmdora.inject_adapters(model, config.parts)
    (group,) = [g for g in optimizer_groups(model, config) if g["name"] == "embeddings"]
    assert group["lr"] == 1e-4
    assert group["params"][0] is model.get_input_embeddings().weight


def test_new_tokens_of_a_vision_language_model_from_a_config(tmp_path):
    """Load, group for the optimizer, train, save, load the adapter directory as a target, and merge."""
    config = load_config("quickstart", ["model.new_tokens=[<left>,<right>]", "model.dtype=float32"])
    model, processor = load_model(config.model)
    mmdora.inject_adapters(model, config.parts)
    (group,) = [g for g in optimizer_groups(model, config) if g["name"] == "new tokens"]
    assert (group["lr"], group["weight_decay"]) == (config.training.learning_rate, 0.0)
    ids = processor.tokenizer.convert_tokens_to_ids(TOKENS)
    write_image(tmp_path / "p.png")
    question = Message("user", (Image(tmp_path / "p.png"), Text("where <left>")))
    sample = Sample("s", (question, Message("assistant", (Text("it is <right>"),))), "t")
    encoded = Encoder(processor, VideoConfig()).encode(sample)
    assert ids[0] in encoded["input_ids"][0].tolist()
    assert ids[1] in encoded["labels"][0].tolist()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model.train()(**encoded).loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = model.eval()(**encoded).logits
    mmdora.save_adapter(model, tmp_path / "adapter")
    loaded = load_target(str(tmp_path / "adapter"), dtype="float32")
    assert loaded.processor.tokenizer.convert_tokens_to_ids(TOKENS) == ids
    with torch.no_grad():
        assert torch.allclose(loaded.model.cpu()(**encoded).logits, expected, atol=1e-5)
    save_model(mmdora.merge_adapters(model), processor, tmp_path / "merged")
    merged, _ = load_model(ModelConfig(path=str(tmp_path / "merged"), dtype="float32"))
    with torch.no_grad():
        assert torch.allclose(merged(**encoded).logits, expected, atol=1e-4)
