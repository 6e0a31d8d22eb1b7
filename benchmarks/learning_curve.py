"""Compare the loss of DoRA with BA added to bf16 weights (`forward: merged`) and with A and B applied to x (`exact`).

    python benchmarks/learning_curve.py --out benchmarks/results/learning-curve.json

A bf16 weight cannot represent a change below half its last bit, so a merged forward pass could miss the first small
steps of training. Here a network of bf16 layers is trained to match a perturbed copy of itself (each weight is moved by
`change`, along 4 directions and in the norm of its rows). Losses are relative to the size of the outputs, each the mean
of 10 steps and several seeds. The same run in fp32 shows the cost of bf16 itself.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import nn

import mmdora

WIDTH, ROWS, STEPS = 256, 512, 300
MARKS = (10, 50, 100, 200, STEPS)
VARIANTS = {"fp32": ("exact", torch.float32), "exact": ("exact", torch.bfloat16), "merged": ("merged", torch.bfloat16)}


def losses(forward: str, dtype: torch.dtype, learning_rate: float, change: float, seed: int, steps: int) -> list[float]:
    """Return the loss of every step, for DoRA of rank 8 on three layers."""
    torch.manual_seed(seed)
    layers = [module for _ in range(3) for module in (nn.Linear(WIDTH, WIDTH, bias=False), nn.GELU())]
    student = nn.Sequential(*layers[:-1]).requires_grad_(False)
    for parameter in student.parameters():
        parameter.mul_(3)  # otherwise each layer shrinks its input, and the final outputs are tiny
    student.bfloat16()
    teacher = copy.deepcopy(student).float()
    for weight in teacher.parameters():
        low_rank = torch.randn(WIDTH, 4) @ torch.randn(4, WIDTH)
        weight += change * weight.norm() / low_rank.norm() * low_rank
        weight *= 1 + change * torch.randn(WIDTH, 1)
    student.to(dtype)
    mmdora.inject_adapters(student, {"": {"method": "dora", "rank": 8, "alpha": 16, "forward": forward}})
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=learning_rate)
    values = []
    for _ in range(steps):
        x = torch.randn(ROWS, WIDTH).bfloat16()
        target = teacher(x.float())
        loss = (student(x.to(dtype)).float() - target).square().mean() / target.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    rows = []
    for learning_rate in (2e-5, 2e-4, 1e-3):
        for change in (0.003, 0.03):
            for variant, (forward, dtype) in VARIANTS.items():
                curves = [losses(forward, dtype, learning_rate, change, seed, STEPS) for seed in range(args.seeds)]
                mean = torch.tensor(curves).mean(0)
                marks = {mark: round(mean[mark - 10 : mark].mean().item(), 6) for mark in MARKS}
                rows.append(
                    {"learning_rate": learning_rate, "change": change, "forward": variant, "loss_at_step": marks}
                )
                print(rows[-1], flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
