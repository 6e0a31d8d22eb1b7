"""Loading a model: a broken file is a one-line error, and no weight is replaced by a random one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration

from mmdora.core.config import ModelConfig
from mmdora.core.errors import UserError
from mmdora.models.loading import load_model
from tests.conftest import ROOT

BASE = ROOT / "assets" / "tiny-llava"


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def edit(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


STORED = "language_model.model.layers.0.self_attn.q_proj.weight"  # its name in LLaVA's files
QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 99}
DAMAGES = {
    "weights are damaged or truncated": cut,
    rf"{QUERY} is missing": edit(lambda tensors: tensors.pop(STORED)),
    rf"{QUERY} has shape \[3, 128\], the model needs \[128, 128\]": edit(
        lambda tensors: tensors.update({STORED: tensors[STORED][:3].clone()})
    ),
    "no file named model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "is not a valid JSON file": lambda folder: (folder / "config.json").write_text("{"),
    "model type `new` but": lambda folder: (folder / "config.json").write_text('{"model_type": "new"}'),
    "do not match its config": lambda folder: (folder / "config.json").write_text(json.dumps(LLAMA)),
    "image processor": lambda folder: [file.unlink() for file in folder.glob("*processor*")],
    "tokenizer": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_model_is_a_one_line_error(reason, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    DAMAGES[reason](folder)
    with pytest.raises(UserError, match=rf"(?i)model\.path: .*{folder}.*{reason}") as error:
        load_model(ModelConfig(path=str(folder), dtype="float32"))
    assert "\n" not in str(error.value)


def test_a_sharded_model_loads(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, _ = load_model(ModelConfig(path=str(tmp_path), dtype="float32"))
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_attention_implementation_can_be_chosen(tiny):
    model, _ = tiny
    ids = torch.arange(3, 20)[None]
    for attention in ("sdpa", "eager"):
        other, _ = load_model(ModelConfig(path=str(BASE), dtype="float32", attention=attention))
        layer = other.model.language_model.layers[0].self_attn
        assert layer.config._attn_implementation == attention
        torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=r"model\.path: .*(?i:flash)"):
        load_model(ModelConfig(path=str(BASE), dtype="bfloat16", attention="flash_attention_2"))


def test_modules_that_a_family_keeps_in_fp32_stay_in_fp32(monkeypatch):
    monkeypatch.setattr(LlavaOnevisionForConditionalGeneration, "_keep_in_fp32_modules_strict", {"down_proj"})
    model, _ = load_model(ModelConfig(path=str(BASE), dtype="bfloat16"))
    layer = model.model.language_model.layers[0].mlp
    assert (layer.down_proj.weight.dtype, layer.up_proj.weight.dtype) == (torch.float32, torch.bfloat16)
