"""Plots of a run, from the files in its directory."""

from __future__ import annotations

import json
from pathlib import Path


def plot_loss(metrics: Path, out: Path) -> None:
    """Plot `metrics.jsonl`: the loss of every step, its running mean, and the loss on held-out samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    points = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    held_out = [(r["step"], r["eval"]["loss"]) for r in rows if r.get("eval", {}).get("loss") is not None]
    smooth, mean = [], losses[0] if losses else 0.0
    for loss in losses:
        mean = 0.9 * mean + 0.1 * loss
        smooth.append(mean)
    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=120)
    axes.plot(steps, losses, color="#9db4c8", linewidth=0.8, label="loss")
    axes.plot(steps, smooth, color="#1f4e79", linewidth=1.8, label="running mean")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#c0504d", linewidth=1.4, marker="o", markersize=3, label="held out"
        )
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)
