"""Files and import paths of version 0.1.0 still work; `tests/data/v0.1.0` was written by it.

`run` is a run of two steps, `adapters` holds two adapter directories with the logits that they gave, and `composed` is
a saved model of mmdora's own class.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmdora
from mmdora._moved import MOVED
from mmdora.apps.load_target import load_target
from mmdora.core.config import ModelConfig
from mmdora.models.loading import load_model
from tests.conftest import ROOT
from tests.test_runs import command

OLD = Path(__file__).parent / "data" / "v0.1.0"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A copy of the old run, in a folder of its own where the shapes dataset is generated."""
    shutil.copytree(OLD / "run", tmp_path / "runs" / "compat")
    monkeypatch.chdir(tmp_path)
    return Path("runs/compat")


@pytest.mark.parametrize(("name", "tokens"), [("peft", ["<new>"]), ("own", [])])
def test_an_old_adapter_directory_computes_the_same(name, tokens):
    expected = load_file(OLD / "adapters" / "logits.safetensors")
    model, _ = load_model(ModelConfig(path="assets/tiny-llava", dtype="float32", new_tokens=tokens))
    mmdora.load_adapter(model, OLD / "adapters" / name)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=expected["input_ids"]).logits, expected[name], atol=1e-5, rtol=1e-5)


def test_an_old_run_is_evaluated_and_gives_its_answers_again(run):
    before = json.loads((run / "eval" / "counting" / "report.json").read_text())
    assert command("eval", str(run), "--out", "again") == 0
    after = json.loads(Path("again/counting/report.json").read_text())
    assert after["scores"] == before["scores"]

    def answers(folder: Path) -> list[tuple[str, str]]:
        rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        return [(row["id"], row["response"]) for row in rows]

    assert answers(Path("again/counting")) == answers(run / "eval" / "counting")


def test_an_old_run_is_resumed(run):
    assert command("train", str(run / "config.yaml"), "training.max_steps=3", "--resume") == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    old = load_file(OLD / "run" / "adapter" / "adapter_model.safetensors")
    new = load_file(run / "adapter" / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[key], new[key]) for key in old)


def test_an_old_run_loads_and_merges(run):
    loaded = load_target(str(run))
    merged = mmdora.merge_adapters(loaded.model)
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]


def test_an_old_saved_model_loads_after_importing_mmdora_models():
    code = """
import sys
import mmdora.models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
expected = load_file(sys.argv[1] + "/expected.safetensors")
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
assert AutoProcessor.from_pretrained(sys.argv[1]).num_image_tokens == 5
with torch.no_grad():
    logits = model(**{key: expected[key] for key in ("input_ids", "pixel_values")}).logits
torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(OLD / "composed")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_import_mmdora_imports_no_torch_and_registers_nothing():
    code = f"""
import sys
import mmdora
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained({str(OLD / "composed")!r})
except ValueError as error:
    assert "llava_resampler" in str(error)
else:
    raise SystemExit("the model class was registered")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_python_m_mmdora_commands_still_runs():
    command = [sys.executable, "-m", "mmdora.commands", "list", "adapters"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dora" in done.stdout


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("old", [old for old in MOVED if not old.endswith("__main__")])
def test_an_old_module_path_warns_and_finds_the_names(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} moved to"):
        module = importlib.import_module(old)
    for home in MOVED[old]:
        new = importlib.import_module(home)
        names = [name for name in vars(new) if not name.startswith("_")]
        assert names
        assert all(hasattr(module, name) for name in names)
    with pytest.raises(AttributeError, match="its names moved to"):
        _ = module.no_such_name


def test_the_public_names_are_those_of_0_1_0():
    names = {
        *("InjectionReport", "LoRAExport", "adapters_by_row", "add_tokens", "combine_adapters", "disable_adapters"),
        *("export_lora", "inject_adapters", "load_adapter", "merge_adapters", "save_adapter", "set_adapter"),
        *("swap_adapter", "unmerge_adapters"),
    }
    assert names <= set(mmdora.__all__)
    assert all(getattr(mmdora, name) for name in names)
