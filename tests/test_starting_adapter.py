"""`model.adapter` continues an adapter, `model.frozen_adapter` trains on top of one; both take PEFT's directories."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mmdora
from mmdora.apps.load_target import load_target
from mmdora.core.errors import UserError
from tests.test_language_models import config, write_data, write_model
from tests.test_runs import command, small

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # of `config`
STILL = ("training.learning_rate=0", "training.max_steps=1", "evaluation=[]")
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, data and the finished run `first`."""
    path = write_data(tmp_path_factory.mktemp("starting"))
    write_model(path / "model")
    assert train(path, "first", "evaluation.0.limit=8") == 0
    return path


def train(folder: Path, run: str, *overrides: str) -> int:
    return command("train", *config(folder, folder / "model", f"training.output={folder}/{run}", *overrides))


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def of_target(target: Path) -> torch.Tensor:
    return logits(load_target(str(target), dtype=None if (target / "config.yaml").exists() else "float32").model)


def write_peft(folder: Path, name: str, **settings) -> Path:
    """Write an adapter that PEFT made, with random values, and return its directory."""
    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "use_dora": True, **settings}
    model = get_peft_model(base(folder), LoraConfig(**options))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data += 0.1 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.5)
    model.save_pretrained(folder / name)
    return folder / name


def test_a_run_continues_from_another_runs_adapter(folder):
    before = "evaluation.0.limit=8"
    assert train(folder, "same", f"model.adapter={folder}/first", *STILL[:2], before) == 0
    first, same = tensors(folder / "first"), tensors(folder / "same")
    assert all(torch.equal(first[key], same[key]) for key in first)
    # `before` is the model that training starts from.
    results = [folder / path / "commonsense" for path in ("first/eval", "same/eval/before")]
    answers = [[json.loads(row) for row in (path / "responses.jsonl").read_text().splitlines()] for path in results]
    answers = [{row["id"]: row["response"] for row in rows} for rows in answers]
    assert answers[0] == answers[1]
    report = json.loads((results[1] / "report.json").read_text())
    assert report["receipt"]["adapter"] == f"{folder}/first"

    assert train(folder, "longer", f"model.adapter={folder}/first/adapter", "evaluation=[]") == 0
    losses = [
        [json.loads(row)["loss"] for row in (folder / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("first", "longer")
    ]
    assert losses[1][0] < losses[0][0] - 0.5


def test_a_run_continues_from_an_adapter_of_peft(folder):
    source = write_peft(folder, "peft", lora_dropout=0.1)
    assert train(folder, "from-peft", f"model.adapter={source}", *STILL) == 0
    expected = logits(PeftModel.from_pretrained(base(folder), source).eval())
    torch.testing.assert_close(of_target(folder / "from-peft"), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(base(folder))).abs().max() > 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parts.language.rank=8"], "has dora of rank 4 with alpha / rank 2, but this run's `parts` give it dora of"),
        (["parts.language.alpha=16"], "give it dora of rank 4 with alpha / rank 4; make them equal"),
        (["parts.language.method=lora"], "give it lora of rank 4 with alpha / rank 2"),
        (["parts.language.targets=[q_proj]"], "made with other `parts`: model.layers.0.mlp.down_proj is adapted in"),
        (["model.adapter=gone"], "model.adapter: 'gone' is neither a finished run nor an adapter directory"),
        (["model.frozen_adapter=gone"], "model.frozen_adapter: 'gone' is neither a finished run nor an adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_an_error(overrides, message, folder, capsys):
    assert train(folder, "other", f"model.adapter={folder}/first", *overrides, "evaluation=[]") == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (folder / "other").exists()


def test_the_adapter_must_not_be_in_the_new_runs_directory(folder, capsys):
    assert train(folder, "first", f"model.adapter={folder}/first", "--overwrite") == 2
    assert "is in training.output; give the new run a directory of its own" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stacked(folder) -> Path:
    """A run that trained LoRA on top of the frozen DoRA of `first`."""
    parts = "parts={language: {method: lora, rank: 2, targets: [q_proj, o_proj]}}"
    assert train(folder, "stacked", f"model.frozen_adapter={folder}/first", parts, "evaluation=[]") == 0
    return folder / "stacked"


def test_a_run_trains_on_top_of_a_frozen_adapter(folder, stacked, tmp_path, capsys):
    model = PeftModel.from_pretrained(base(folder), folder / "first" / "adapter").merge_and_unload().eval()
    frozen_alone = logits(model)
    torch.testing.assert_close(frozen_alone, of_target(folder / "first"), atol=1e-4, rtol=1e-4)
    copy = tmp_path / "plain"  # the new adapter, as PEFT would read it on the right base
    shutil.copytree(stacked / "adapter", copy)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"]}
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    expected = logits(PeftModel.from_pretrained(model, copy).eval())
    assert (expected - frozen_alone).abs().max() > 0.01
    torch.testing.assert_close(of_target(stacked), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(of_target(stacked / "adapter"), expected, atol=1e-4, rtol=1e-4)

    assert command("merge", str(stacked), str(tmp_path / "merged")) == 0
    assert float(capsys.readouterr().out.split("difference")[1].split()[0]) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_a_stacked_adapter_is_not_read_without_the_one_below_it(folder, stacked, tmp_path, capsys):
    with pytest.raises(Exception, match="MMDORA"):
        PeftModel.from_pretrained(base(folder), stacked / "adapter")
    with pytest.raises(UserError, match=rf"trained on top of {folder}/first/adapter, and this model includes no other"):
        mmdora.load_adapter(base(folder), stacked / "adapter")
    assert command("merge", str(stacked), str(tmp_path / "lora"), "--lora-rank", "2") == 2
    assert "was trained on top of" in capsys.readouterr().err


@pytest.mark.slow
def test_stacks_continue_and_grow(folder, stacked, capsys, caplog):
    parts = "parts={language: {method: lora, rank: 2, targets: [q_proj, o_proj]}}"
    again = (f"model.adapter={stacked}", parts, *STILL)
    assert train(folder, "again", f"model.frozen_adapter={folder}/first", *again) == 0
    torch.testing.assert_close(of_target(folder / "again"), of_target(stacked), atol=1e-6, rtol=1e-6)
    assert train(folder, "wrong", *again) == 2
    assert f"set model.frozen_adapter to {folder}/first/adapter" in capsys.readouterr().err.replace("\n", " ")
    # An adapter that was trained alone may continue on top of another one.
    on_top = (f"model.adapter={folder}/first", f"model.frozen_adapter={folder}/first")
    assert train(folder, "twice", *on_top, *STILL) == 0
    assert "it continues on top of it now" in caplog.text
    assert train(folder, "third", f"model.frozen_adapter={stacked}", *STILL) == 0
    torch.testing.assert_close(of_target(folder / "third"), of_target(stacked), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_stacked_run_resumes_bit_exactly(folder, stacked):
    again = folder / "resumed"
    shutil.copytree(stacked, again)
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(again / name)
    parts = "parts={language: {method: lora, rank: 2, targets: [q_proj, o_proj]}}"
    frozen = f"model.frozen_adapter={folder}/first"
    assert train(folder, "resumed", frozen, parts, "evaluation=[]", "--resume") == 0
    expected, found = tensors(stacked), tensors(again)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_every_part_of_a_multimodal_model_continues(world, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert command("train", *small(world, first, steps=2), "evaluation=[]") == 0
    still = [f"parts.{part}.learning_rate=0" for part in ("vision", "projector", "language")]
    assert command("train", *small(world, second, steps=1), *still, "evaluation=[]", f"model.adapter={first}") == 0
    expected, found = tensors(first), tensors(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
