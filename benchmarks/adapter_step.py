"""Measure the cost of an adapter: forward + backward of a few Llama layers, relative to frozen layers.

    python benchmarks/adapter_step.py                                          # on a CPU
    python benchmarks/adapter_step.py --hidden 4096 --tokens 8192 --layers 2   # on a GPU, at the shapes of a 7B model

Every round times one step of all candidates in a random order. Figures are medians over the rounds, and ratios to the
frozen layers of the same run, since timings are noisy. As in mmdora's trainer, DoRA's norms are computed once per step
(mmdora's timings include that). Saved activations are what autograd keeps for the backward pass, in addition to the
weights and to what the frozen layers keep; the peak is that of the GPU's allocator over one step.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from machine import about_machine
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import mmdora
from mmdora.adapters.ops.norm_cache import weights_fixed

Build = Callable[[LlamaModel, int], nn.Module]


def frozen(model: LlamaModel, rank: int) -> nn.Module:
    return model.requires_grad_(False)


def with_peft(use_dora: bool, autocast_adapter_dtype: bool) -> Build:
    """Use PEFT; by its default, `autocast_adapter_dtype`, adapters of a half-precision model are kept in fp32."""

    def build(model: LlamaModel, rank: int) -> nn.Module:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=use_dora)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)

    return build


def with_mmdora(method: str, forward: str = "auto") -> Build:
    def build(model: LlamaModel, rank: int) -> nn.Module:
        mmdora.inject_adapters(model, {"": {"method": method, "rank": rank, "alpha": 2 * rank, "forward": forward}})
        return model

    return build


CANDIDATES: dict[str, Build] = {
    "frozen": frozen,
    "PEFT LoRA": with_peft(use_dora=False, autocast_adapter_dtype=True),
    "PEFT LoRA, adapters in the model's dtype": with_peft(use_dora=False, autocast_adapter_dtype=False),
    "PEFT DoRA": with_peft(use_dora=True, autocast_adapter_dtype=True),
    "PEFT DoRA, adapters in the model's dtype": with_peft(use_dora=True, autocast_adapter_dtype=False),
    "mmdora LoRA": with_mmdora("lora"),
    "mmdora DoRA": with_mmdora("dora"),
    "mmdora DoRA, exact forward": with_mmdora("dora", "exact"),
    "mmdora DoRA, merged forward": with_mmdora("dora", "merged"),
}


def step(model: nn.Module, x: Tensor) -> None:
    """Run one forward and backward pass, down to the gradient of the input [1, tokens, hidden]."""
    with weights_fixed():
        _step(model, x)


def _step(model: nn.Module, x: Tensor) -> None:
    model(inputs_embeds=x).last_hidden_state.float().square().mean().backward()
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None


def seconds(model: nn.Module, x: Tensor) -> float:
    _synchronize(x)
    start = time.perf_counter()
    step(model, x)
    _synchronize(x)
    return time.perf_counter() - start


class Saved:
    """A tensor saved by autograd; alive as long as autograd holds it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd saves for the backward pass: each storage once, parameters excluded."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: weakref.WeakSet[Saved] = weakref.WeakSet()  # tensors of a graph that is freed during the pass drop out

    def pack(tensor: Tensor) -> Saved:
        held.add(saved := Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        out = model(inputs_embeds=x).last_hidden_state
    storages = {s.data_ptr(): s.nbytes() for s in (saved.tensor.untyped_storage() for saved in held)}
    del out
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def peak_bytes(model: nn.Module, x: Tensor) -> int | None:
    """Return the peak memory of one step, weights included; None without a GPU."""
    if not x.is_cuda:
        return None
    torch.cuda.reset_peak_memory_stats()
    step(model, x)
    return torch.cuda.max_memory_allocated()


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer's forward in the backward")
    parser.add_argument(
        "--only", nargs="*", choices=CANDIDATES, metavar="NAME", help="candidates to measure besides `frozen`"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures, such as benchmarks/results/NAME.json")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 43 // 16,  # 11008 for 4096, as in Llama 7B
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 128),
    )
    base = LlamaModel(config).to(device, dtype)
    names = ["frozen", *args.only] if args.only else list(CANDIDATES)
    models = {name: CANDIDATES[name](copy.deepcopy(base), args.rank).train() for name in names}
    if args.checkpointing:
        for model in models.values():
            layers = model.get_base_model() if hasattr(model, "get_base_model") else model
            layers.gradient_checkpointing_enable({"use_reentrant": False})
    x = torch.randn(1, args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)

    saved = {name: saved_bytes(model, x) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        step(model, x)  # warm up
    for _ in range(args.rounds):
        for name in random.sample(list(models), len(models)):
            times[name].append(seconds(models[name], x))
    peaks = {name: peak_bytes(model, x) for name, model in models.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    figures = {
        name: {
            "step_over_frozen": round(medians[name] / medians["frozen"], 3),
            "saved_over_frozen_mib": round((saved[name] - saved["frozen"]) / 2**20, 1),
            "peak_mib": None if peaks[name] is None else round(peaks[name] / 2**20, 1),
        }
        for name in models
    }
    metadata = about_machine() | {
        "shape": {
            k: getattr(args, k) for k in ("hidden", "layers", "tokens", "rank", "dtype", "rounds", "checkpointing")
        },
        "frozen_ms": round(medians["frozen"] * 1000, 2),
    }
    text = json.dumps(metadata | {"figures": figures}, indent=2)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return
    print(f"{'':42} {'step':>6} {'saved, MiB':>11} {'peak, MiB':>10}   (step over frozen: {metadata['frozen_ms']} ms)")
    for name, row in figures.items():
        peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(f"{name:42} {row['step_over_frozen']:6.3f} {row['saved_over_frozen_mib']:11.1f} {peak:>10}")


if __name__ == "__main__":
    main()
