"""Train tiny models under `fully_shard` as two processes and as one: `python -m tests.sharded_worker FOLDER`.

Importing torch and transformers takes longer than all cases, so they share two processes. Each process trains the
whole model on the whole batch, and its share of the sharded model on its half of it. FOLDER gets, from rank 0, a file
`<case>.json` with a `Comparison`, or with the traceback of a case that failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel
from transformers.pytorch_utils import Conv1D

import mmdora
from mmdora.adapters.layers.wrapping import adapter_layers, plain_path
from mmdora.adapters.ops.norm_cache import weights_fixed
from mmdora.core.distributed import rank
from mmdora.core.errors import UserError
from tests.tiny_language_models import build
from tests.tiny_models import VIT, write_tokenizer

ROWS, LENGTH, STEPS = 4, 10, 2
DORA = {"method": "dora", "rank": 4, "alpha": 8}
LEAVES = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)


def language_model(family: str = "llama", **changes: Any) -> nn.Module:
    return build(family, **changes).train()


def vision_tower() -> nn.Module:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**VIT, attention_dropout=0.0)).train()


def with_new_tokens(family: str) -> nn.Module:
    model = language_model(family)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        mmdora.add_tokens(model, AutoTokenizer.from_pretrained(folder), ["<left>", "<right>"])
    return model


@dataclass(frozen=True)
class Case:
    """A model, its adapter, and how it is sharded."""

    parts: dict[str, Any]
    build: Callable[[], nn.Module] = language_model
    layout: str = "layers"
    wrap: Callable[[nn.Module], Any] = lambda model: None  # before the model is sharded
    policy: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    second_adapter: bool = False
    micro_batches: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Largest differences between two processes and one, relative to the largest value of each tensor."""

    loss: float
    gradient: float
    saved_at_start: float  # tensors of the adapter directory before training
    saved: float  # and after it
    same_config: bool
    gradients: int


def units(model: Any, layout: str) -> Sequence[Any]:
    """Return the modules, or lists of modules, that are one unit each, in the order of the calls of `fully_shard`."""
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    if layout == "linears":
        return [*(m for m in model.modules() if isinstance(m, LEAVES)), *blocks, model]
    if layout == "linears alone":
        return [m for m in model.modules() if isinstance(m, LEAVES)] + [model]
    if layout == "mixed":  # q alone, k and v in the unit of their block
        return [*(m for path, m in model.named_modules() if path.endswith("q_proj")), *blocks, model]
    if layout == "tied":
        return [*blocks, [model.get_input_embeddings(), model.get_output_embeddings()], model]
    return [*blocks, model] if layout == "layers" else [model]


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    if isinstance(model, CLIPVisionModel):
        return {"pixel_values": torch.randn(ROWS, 3, VIT["image_size"], VIT["image_size"], generator=generator)}
    ids = torch.randint(3, model.config.vocab_size, (ROWS, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return output.loss if hasattr(output, "loss") else output.last_hidden_state.float().square().mean()


def prepared(case: Case) -> nn.Module:
    """Return the case's model with adapters that already change the output."""
    torch.manual_seed(3)
    model = case.build()
    names = ["default", "second"] if case.second_adapter else ["default"]
    for name in names:
        mmdora.inject_adapters(model, case.parts, name=name)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "vera_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def train(model: nn.Module, batch: dict[str, Tensor], micro_batches: int) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of every step and the whole gradients of the first."""
    losses, gradients = [], {}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        rows = len(next(iter(batch.values()))) // micro_batches
        with weights_fixed() if micro_batches > 1 else contextlib.nullcontext():
            total = 0.0
            for i in range(micro_batches):
                loss = loss_of(model, {key: value[rows * i : rows * (i + 1)] for key, value in batch.items()})
                (loss / micro_batches).backward()
                total += loss.item() / micro_batches
        losses.append(total)
        if step == 0:
            named = model.named_parameters()
            gradients = {plain_path(name): whole(p.grad).clone() for name, p in named if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def saved(model: nn.Module, folder: Path, name: str) -> tuple[dict[str, Tensor], str]:
    mmdora.save_adapter(model, folder, name=name)
    dist.barrier()
    return load_file(folder / "adapter_model.safetensors"), (folder / "adapter_config.json").read_text()


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to each tensor's largest value; infinite for different names."""
    if one.keys() != other.keys() or any(one[k].dtype != other[k].dtype for k in one):
        return float("inf")
    return max(((one[k] - other[k]).abs().max() / one[k].abs().max().clamp_min(1e-6)).item() for k in one)


def comparison(case: Case, folder: Path) -> dict[str, Any]:
    """Return the fields of a `Comparison`."""
    alone, sharded = prepared(case), prepared(case)
    case.wrap(sharded)
    options = dict(case.options)
    if "mesh" in options:
        options["mesh"] = init_device_mesh("cpu", options["mesh"], mesh_dim_names=("replicate", "shard"))
    for unit in units(sharded, case.layout):
        fully_shard(unit, mp_policy=case.policy, **options)
    start = saved(alone, folder / "start", "default"), saved(sharded, folder / "sharded_start", "default")
    batch, rank = batch_of(alone), dist.get_rank()
    half = {key: value[rank * ROWS // 2 : (rank + 1) * ROWS // 2] for key, value in batch.items()}
    for name in ["default", "second"] if case.second_adapter else ["default"]:
        if case.second_adapter:
            mmdora.set_adapter(alone, name)
            mmdora.set_adapter(sharded, name)
        losses, gradients = train(alone, batch, case.micro_batches)
        own_losses, own_gradients = train(sharded, half, case.micro_batches)
    means = torch.tensor(own_losses)
    dist.all_reduce(means)
    # Evaluation leaves the root's parameters gathered, cast to the policy's dtype.
    with torch.no_grad():
        loss_of(sharded, half)
    end = saved(alone, folder / "end", name), saved(sharded, folder / "sharded_end", name)
    found = Comparison(
        loss=(means / dist.get_world_size() - torch.tensor(losses)).abs().max().item(),
        gradient=difference(gradients, own_gradients),
        saved_at_start=difference(start[0][0], start[1][0]),
        saved=difference(end[0][0], end[1][0]),
        same_config=start[0][1] == start[1][1],
        gradients=len(gradients),
    )
    return asdict(found)


def checkpointed(model: nn.Module) -> None:
    apply_activation_checkpointing(model, check_fn=lambda block: type(block).__name__ == "LlamaDecoderLayer")


def dtype_if_trained(parameter: nn.Parameter) -> torch.dtype | None:
    return parameter.dtype if parameter.requires_grad else None


LANGUAGE = {"language": DORA}
WITH_HEAD = {"language": DORA, "lm_head": {"method": "full"}}
QKV = DORA | {"targets": ["q_proj", "k_proj", "v_proj"]}
CASES = {
    "a layer each": Case(WITH_HEAD),
    "a linear layer each": Case(WITH_HEAD, layout="linears"),
    "a linear layer each, kept": Case(WITH_HEAD, layout="linears", options={"reshard_after_forward": False}),
    "linear layers alone": Case(LANGUAGE, layout="linears alone"),
    "mixed units": Case(LANGUAGE, layout="mixed"),
    "the root alone": Case(WITH_HEAD, layout="root"),
    "tied, head in full": Case(WITH_HEAD, partial(language_model, "qwen2")),
    "tied, embeddings in full": Case(
        {"language": DORA, "embeddings": {"method": "full"}}, partial(language_model, "qwen2")
    ),
    "embeddings": Case({"embeddings": DORA}, layout="linears"),
    "experts": Case(
        {"language": DORA | {"targets": ["gate_up_proj", "down_proj", "q_proj"]}}, partial(language_model, "mixtral")
    ),
    "convolution": Case({"": DORA | {"targets": ["patch_embedding", "q_proj", "fc1"]}}, vision_tower, layout="linears"),
    "GPT-2": Case(LANGUAGE, partial(language_model, "gpt2")),
    "lora and dora": Case({"language": DORA | {"magnitude_targets": ["q_proj", "down_proj"]}}),
    "dvora": Case({"language": {"method": "dvora", "rank": 4}}),
    "magnitude": Case({"language": {"method": "magnitude"}}),
    "checkpointing": Case(LANGUAGE, wrap=lambda m: m.gradient_checkpointing_enable()),
    "checkpoint wrapper": Case(
        LANGUAGE,
        wrap=checkpointed,
    ),
    "bf16 base": Case(LANGUAGE, lambda: language_model().bfloat16()),
    "wrapped block in full": Case({"language": {"method": "full", "last_blocks": 1}}, wrap=checkpointed),
    "bf16 policy": Case(LANGUAGE, policy=MixedPrecisionPolicy(torch.bfloat16)),
    "bf16 policy, root": Case(WITH_HEAD, policy=MixedPrecisionPolicy(torch.bfloat16), layout="root"),
    "bf16 policy, kept": Case(
        LANGUAGE, policy=MixedPrecisionPolicy(torch.bfloat16, param_dtype_override_fn=dtype_if_trained)
    ),
    "new tokens, untied": Case(LANGUAGE, partial(with_new_tokens, "llama"), layout="linears"),
    "new tokens, tied": Case(LANGUAGE, partial(with_new_tokens, "qwen2"), layout="tied"),
    "hybrid": Case(LANGUAGE, options={"mesh": (2, 1)}),
    "two adapters": Case({"language": QKV}, second_adapter=True),
    "norms cached": Case(LANGUAGE, layout="linears", micro_batches=2),
}


def error_of(action: Callable[[], Any]) -> str:
    """Return the message of the UserError that the action raises."""
    try:
        action()
    except UserError as error:
        return str(error)
    return "no error"


def sharded_model(parts: dict[str, Any] = LANGUAGE) -> nn.Module:
    model = prepared(Case(parts))
    for unit in units(model, "layers"):
        fully_shard(unit)
    return model


def errors(folder: Path) -> dict[str, str]:
    """Return the error of everything that a sharded or tensor-parallel model does not support."""
    model, batch = sharded_model(), batch_of(language_model())
    mmdora.save_adapter(model, folder / "adapter")
    mmdora.save_adapter(prepared(Case({"language": DORA | {"rank": 2}})), folder / "rank-2")
    dist.barrier()
    mesh = init_device_mesh("cpu", (2,))
    plain = language_model()
    parallelize_module(plain, mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    column, row, inputs = (prepared(Case(LANGUAGE)) for _ in range(3))
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    layouts = {"input_layouts": (Replicate(),), "desired_input_layouts": (Replicate(),)}
    parallelize_module(inputs, mesh, {up: PrepareModuleInput(**layouts, use_local_output=False)})
    wrapped = nn.Sequential(FullyShardedDataParallel.__new__(FullyShardedDataParallel))  # it needs a GPU to be made
    nn.Module.__init__(wrapped[0])
    return {
        "inject_adapters": error_of(lambda: mmdora.inject_adapters(model, LANGUAGE, name="other")),
        "load_adapter": error_of(lambda: mmdora.load_adapter(model, folder / "adapter", name="other")),
        "swap_adapter": error_of(lambda: mmdora.swap_adapter(model, folder / "rank-2")),
        "merge_adapters": error_of(lambda: mmdora.merge_adapters(model)),
        "combine_adapters": error_of(lambda: mmdora.combine_adapters(model, {"default": 1.0}, "sum")),
        "export_lora": error_of(lambda: mmdora.export_lora(model, folder / "lora", 2)),
        "add_tokens": error_of(lambda: mmdora.add_tokens(model, None, ["<left>"])),
        "a module inside": error_of(lambda: model.model.layers[0].mlp.up_proj(torch.zeros(1, 32))),
        "tensor parallel: inject_adapters": error_of(lambda: mmdora.inject_adapters(plain, LANGUAGE)),
        "tensor parallel: columns": error_of(lambda: parallelize_module(column, mesh, {up: ColwiseParallel()})),
        "tensor parallel: rows": error_of(lambda: parallelize_module(row, mesh, {down: RowwiseParallel()})),
        "tensor parallel: input": error_of(lambda: inputs(**batch)),
        "FSDP1": error_of(lambda: mmdora.save_adapter(wrapped, folder / "wrapped")),
    }


def swaps(folder: Path) -> dict[str, Any]:
    """Swap adapters of a sharded model, before and after a forward pass."""
    model, batch = sharded_model(WITH_HEAD), batch_of(language_model())
    before, _ = saved(model, folder / "first", "default")
    with torch.no_grad():
        outputs = [model(**batch).logits]
    train(model, batch, 1)
    trained, _ = saved(model, folder / "second", "default")
    with torch.no_grad():
        outputs.append(model(**batch).logits)
    mmdora.swap_adapter(model, folder / "first")
    again, _ = saved(model, folder / "third", "default")
    with torch.no_grad():
        outputs.append(model(**batch).logits)
    return {
        "changed": difference(before, trained) > 1e-3,
        "restored": difference(before, again) == 0.0,
        "outputs": [(outputs[0] - other).abs().max().item() for other in outputs[1:]],
        "read": reading_difference(),
        "launcher": "RANK" in os.environ,
        "rank": rank() == dist.get_rank(),
    }


def reading_difference() -> float:
    """Return the largest difference of norms, gains and merged weights between a sharded model and a whole one."""
    parts = {"language": DORA | {"targets": ["gate_up_proj", "q_proj"]}}
    alone, sharded = (prepared(Case(parts, partial(language_model, "mixtral"))) for _ in range(2))
    for unit in units(sharded, "layers"):
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    pairs = list(zip(adapter_layers(sharded), adapter_layers(alone), strict=True))
    largest = 0.0
    with weights_fixed(), torch.no_grad():
        sharded(**batch_of(alone))  # caches the norms of weights in bf16
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for read in ("norm", "gain", "merged", "fresh_norm"):
            for (_, mine), (_, other) in pairs:
                difference = getattr(mine, read)("default") - getattr(other, read)("default")
                largest = max(largest, difference.abs().max().item())
    return largest


def main(folder: Path, only: list[str]) -> None:
    # A process of torch.multiprocessing lacks the variable that launchers set.
    place, count = int(os.environ.pop("RANK")), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=place, world_size=count, timeout=timedelta(seconds=60))
    actions = {name: partial(comparison, case) for name, case in CASES.items()} | {"errors": errors, "swaps": swaps}
    for name, action in actions.items():
        if only and name not in only:
            continue
        try:
            answer = action(folder / name.replace(" ", "-"))
        except Exception:
            answer = {"error": traceback.format_exc()}
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
