"""Measure the cost of an adapter in generation: greedy tokens of a few Llama layers, relative to the base model.

    python benchmarks/generate.py --out benchmarks/results/generate-cpu-1024.json    # on a CPU
    python benchmarks/generate.py --hidden 4096 --layers 8                           # on a GPU, layers of a 7B model

Every round generates with all candidates in a random order. Figures are medians over the rounds, and ratios to the base
model of the same run: CPU seconds of all threads, or on a GPU wall-clock seconds. The candidates:
- `separate`: the adapter is computed at every token, DoRA's norms too (mmdora before `merged_weights`).
- `norms once`: inside `weights_fixed`, as where the weights cannot be merged.
- `merged_weights`: inside the block that `mmdora eval` and `chat` use; the time to merge and to restore is apart.
- `merge_adapters`: a merged model.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from machine import about_machine
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mmdora
from mmdora.adapters.ops.norm_cache import weights_fixed

PROMPT = 8  # tokens
Candidate = tuple[Any, Callable[[], AbstractContextManager[Any]]]


def base_model(hidden: int, layers: int, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


def candidates(base: Any, rank: int) -> dict[str, Candidate]:
    """Return each candidate's model, and the block in which it generates."""
    adapted = copy.deepcopy(base)
    mmdora.inject_adapters(adapted, {"language": {"method": "dora", "rank": rank, "alpha": 2 * rank}})
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    merged = mmdora.merge_adapters(copy.deepcopy(adapted))
    return {
        "base": (base, nullcontext),
        "separate": (adapted, nullcontext),
        "norms once": (adapted, weights_fixed),
        "merged_weights": (adapted, lambda: mmdora.merged_weights(adapted)),
        "merge_adapters": (merged, nullcontext),
    }


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def seconds(candidate: Candidate, prompt: Tensor, tokens: int) -> tuple[float, float]:
    """Return the seconds of the generation, and of entering and leaving the block."""
    model, block = candidate
    device = prompt.device.type
    before = clock(device)
    with block():
        start = clock(device)
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
        end = clock(device)
    return end - start, start - before + clock(device) - end


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = candidates(base_model(args.hidden, args.layers, dtype, device), args.rank)
    prompt = torch.randint(3, 1000, (args.batch, PROMPT), device=device)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(args.rounds + 1):
        for name in random.sample(list(models), len(models)):
            result = seconds(models[name], prompt, args.tokens)
            rounds[name] += [result] if number else []  # the first round warms up
    medians = {name: statistics.median(generation for generation, _ in results) for name, results in rounds.items()}
    block = statistics.median(around for _, around in rounds["merged_weights"])
    return {
        "base_seconds": round(medians["base"], 4),
        "over the base model": {name: round(value / medians["base"], 3) for name, value in medians.items()},
        "merge_and_restore_seconds": round(block, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", help="a remark on the machine, for the file")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    figures = {str(dtype).removeprefix("torch."): measure(args, dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(json.dumps(figures, indent=2))
    if args.out is not None:
        shape = {key: getattr(args, key) for key in ("hidden", "layers", "rank", "tokens", "batch", "rounds", "note")}
        args.out.write_text(
            json.dumps(about_machine() | shape | {"figures": figures}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
