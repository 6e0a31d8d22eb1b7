"""`fully_shard` (FSDP2) in a PyTorch loop: two processes train and save what one does; what is refused is named."""

from __future__ import annotations

import itertools
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import mmdora
from tests.conftest import ROOT
from tests.grid import free_port
from tests.processes import ranks, wait_for_all
from tests.sharded_worker import CASES
from tests.tiny_language_models import build
from tests.tiny_models import write_language_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tested on Linux only")
SLOW = {
    "a layer each",
    "a linear layer each",
    "linear layers alone",
    "tied, head in full",
    "GPT-2",
    "dvora",
    "magnitude",
    "checkpointing",
    "bf16 base",
    "bf16 policy, root",
    "bf16 policy, kept",
    "wrapped block in full",
    "new tokens, untied",
    "hybrid",
}
EXACT = 1e-5  # of fp32; the two processes add the gradients of their halves in another order
HALF_PRECISION = 0.1


def run(folder: Path, names: list[str]) -> dict[str, dict]:
    environment = {"OMP_NUM_THREADS": "1"}
    processes = ranks(["-m", "tests.sharded_worker", str(folder), *names], free_port(), environment=environment)
    ends = wait_for_all(processes, limit=300)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-2000:] + ends[1].stderr[-2000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("sharded"), [*(set(CASES) - SLOW), "errors", "swaps"])


def check(name: str, case: dict) -> None:
    """Losses, gradients and the saved adapter are those of one process."""
    assert "error" not in case, case["error"]
    tolerance = HALF_PRECISION if "bf16" in name else EXACT
    assert case["gradients"] > 2
    assert case["loss"] <= tolerance
    assert case["gradient"] <= tolerance
    assert case["saved"] <= tolerance
    assert case["saved_at_start"] == (0.0 if name != "lora and dora" else pytest.approx(0, abs=1e-6))
    assert case["same_config"]


@pytest.mark.parametrize("name", sorted(set(CASES) - SLOW))
def test_two_processes_train_and_save_what_one_does(found, name):
    check(name, found[name])


@pytest.mark.slow
def test_more_models_and_units(tmp_path):
    for name, case in run(tmp_path, sorted(SLOW)).items():
        check(name, case)


def test_a_sharded_model_swaps_adapters_of_the_same_shapes(found):
    """Also right after an evaluation, which leaves the outermost unit's parameters gathered."""
    swaps = found["swaps"]
    assert "error" not in swaps, swaps["error"]
    assert swaps["changed"]
    assert swaps["restored"]
    assert swaps["outputs"][0] > 1e-2
    assert swaps["outputs"][1] < 1e-5


def test_norms_gains_and_merged_weights_of_a_sharded_model_are_those_of_its_whole_weights(found):
    """Also while the norm cache holds norms of weights that a MixedPrecisionPolicy cast to bf16."""
    assert found["swaps"]["read"] < 1e-5


def test_without_a_launcher_the_rank_is_that_of_the_process_group(found):
    """Otherwise every process of torch.multiprocessing would write the adapter."""
    assert not found["swaps"]["launcher"]
    assert found["swaps"]["rank"]


SHARDED = "the model is sharded by fully_shard already; "
SPLIT = r"tensor parallelism \(Shard\(dim=0\) over 2 processes\), which adapters do not support; load the model without"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("inject_adapters", f"inject_adapters: {SHARDED}call inject_adapters before fully_shard"),
        ("load_adapter", f"load_adapter: {SHARDED}load the adapter before fully_shard, or use swap_adapter"),
        ("swap_adapter", "rank-2: model.layers.0.self_attn.q_proj needs tensors of other shapes than the model's"),
        ("merge_adapters", f"merge_adapters: {SHARDED}call save_adapter, and do this in one process"),
        ("combine_adapters", f"combine_adapters: {SHARDED}call save_adapter, and do this in one process"),
        ("export_lora", f"export_lora: {SHARDED}call save_adapter, and do this in one process"),
        ("add_tokens", f"add_tokens: {SHARDED}call add_tokens before fully_shard"),
        (
            "a module inside",
            r"layers.0.mlp.up_proj has adapters, and was called while its weight is split .*call the model",
        ),
        ("tensor parallel: inject_adapters", f"inject_adapters: model.layers.0.mlp.up_proj.weight is split by {SPLIT}"),
        ("tensor parallel: columns", "layers.0.mlp.up_proj has adapters, and was given to parallelize_module"),
        ("tensor parallel: rows", "layers.0.mlp.down_proj has adapters, and was given to parallelize_module"),
        ("tensor parallel: input", "layers.0.mlp.up_proj has adapters, and its input is a DTensor.*tensor parallelism"),
        ("FSDP1", "wrapped in FullyShardedDataParallel.*torch.distributed.fsdp.fully_shard instead"),
    ],
)
def test_what_is_not_supported_is_one_clear_error(found, action, message):
    assert "error" not in found["errors"], found["errors"]["error"]
    assert re.search(message, found["errors"][action])


def test_blocks_that_torch_wraps_keep_their_names_in_the_adapter(tmp_path):
    """`torch.compile` of a block, and activation checkpointing, put a module around it."""
    from safetensors.torch import load_file
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for parts in (
        {"language": {"method": "magnitude"}, "lm_head": {"method": "full"}},
        {"language": {"method": "full"}},
        {"language": {"method": "full", "last_blocks": 1}},
    ):
        expected = None
        for wrap, first in itertools.product(
            (None, checkpoint_wrapper, partial(torch.compile, backend="eager")), (0, 1)
        ):
            model = build("llama")
            for step in ("wrap", "inject") if first else ("inject", "wrap"):
                if step == "inject":
                    mmdora.inject_adapters(model, parts)
                elif wrap is not None:
                    model.model.layers = nn.ModuleList(map(wrap, model.model.layers))
            mmdora.save_adapter(model, tmp_path / "adapter")
            tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
            config = (tmp_path / "adapter" / "adapter_config.json").read_text()
            expected = expected or (tensors, config)
            assert tensors.keys() == expected[0].keys()
            assert all(torch.equal(tensors[name], expected[0][name]) for name in tensors)
            assert config == expected[1]
            mmdora.swap_adapter(model, tmp_path / "adapter")
        assert any("model.layers.1.mlp.up_proj" in name for name in expected[0])


def test_the_loop_of_the_page_runs(tmp_path):
    """docs/scaling.md: two processes run its code; the adapter that it writes changes a base model's output."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    base = write_language_model(tmp_path / "base", "llama")
    ids = "torch.tensor([[3, 4, 5, 6]])"
    start = f"""
import os
import torch
from transformers import AutoModelForCausalLM
os.chdir({str(tmp_path)!r})
model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16)
batches = [{{"input_ids": {ids}, "labels": {ids}}}] * 2
"""
    ends = wait_for_all(ranks(["-c", start + code], free_port(), environment={"OMP_NUM_THREADS": "1"}), limit=200)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-2000:] + ends[1].stderr[-2000:]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    inputs = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = model(inputs).logits
        mmdora.load_adapter(model, tmp_path / "out")
        assert (model(inputs).logits - before).abs().max() > 1e-4
