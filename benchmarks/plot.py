"""Draw the figure of docs/adapters.md from benchmarks/results/: `python benchmarks/plot.py`."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
NAMES = {
    "PEFT DoRA": "PEFT DoRA",
    "PEFT DoRA, adapters in the model's dtype": "PEFT DoRA, half-precision adapters",
    "PEFT LoRA": "PEFT LoRA",
    "PEFT LoRA, adapters in the model's dtype": "PEFT LoRA, half-precision adapters",
    "mmdora DoRA": "mmdora DoRA",
    "mmdora LoRA": "mmdora LoRA",
}


def main() -> None:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((HERE / "results").glob("*-r*.json"))]
    figure, panels = plt.subplots(
        1, len(results), figsize=(4.6 * len(results), 2.6), dpi=120, sharey=True, squeeze=False
    )
    for axes, result in zip(panels[0], results, strict=True):
        shape, values = result["shape"], [result["figures"][name]["step_over_frozen"] for name in NAMES]
        colors = ["#1f4e79" if name.startswith("mmdora") else "#9db4c8" for name in NAMES]
        bars = axes.barh(list(NAMES.values()), [value - 1 for value in values], color=colors)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
        title = f"{shape['hidden']} wide, {shape['tokens']} tokens, {shape['dtype']}, r = {shape['rank']}"
        axes.set_title(f"{result['hardware']}\n{title}", fontsize=8)
        axes.set_xlim(0, 1.15 * (max(values) - 1))
        axes.set_xticks([])
        axes.tick_params(axis="y", labelsize=8, length=0)
        axes.invert_yaxis()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.supxlabel("step time as a multiple of frozen layers", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "adapter_step.png")


if __name__ == "__main__":
    main()
