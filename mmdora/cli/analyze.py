"""`mmdora analyze`: how far tuning moved each adapted layer's magnitude and direction."""

from __future__ import annotations

from mmdora.analysis.decomposition import analyze, correlation
from mmdora.apps.load_target import load_target
from mmdora.core.console import make_console, make_table
from mmdora.core.errors import UserError
from mmdora.core.logs import quiet_libraries


def run(target: str, trust_remote_code: bool) -> None:
    quiet_libraries()
    console = make_console()
    changes = analyze(load_target(target, trust_remote_code).model)
    if not changes:
        raise UserError(f"{target}: no layer of it has an adapter")
    table = make_table("change of weights", "layer", "ΔM", "ΔD")
    for change in changes:
        table.add_row(change.path, f"{change.magnitude:.4f}", f"{change.direction:.4f}")
    console.print(table)
    console.print(f"correlation of ΔD and ΔM over {len(changes)} layers: {correlation(changes):+.2f}")
    console.print("(the paper's, on VL-BART's query matrices: full fine-tuning −0.62, DoRA −0.31, LoRA +0.83)")
