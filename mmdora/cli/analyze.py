"""`mmdora analyze`."""

from __future__ import annotations

from mmdora.cli.app import Target, Trust, app


@app.command()
def analyze(run: Target, trust_remote_code: Trust = False) -> None:
    """Show how training changed each adapted layer.

    Prints the change of magnitude (ΔM) and direction (ΔD) of each layer's weight, and their correlation.
    """
    from mmdora.apps.check_paths import check_target

    check_target(run)

    from mmdora.analysis.decomposition import analyze as decompose
    from mmdora.analysis.decomposition import correlation
    from mmdora.apps.load_target import load_target
    from mmdora.core.console import make_console, make_table
    from mmdora.core.errors import UserError
    from mmdora.core.logs import quiet_libraries

    quiet_libraries()
    console = make_console()
    changes = decompose(load_target(run, trust_remote_code).model)
    if not changes:
        raise UserError(f"{run}: no layer has an adapter")
    table = make_table("weight changes", "layer", "ΔM", "ΔD")
    for change in changes:
        table.add_row(change.path, f"{change.magnitude:.4f}", f"{change.direction:.4f}")
    console.print(table)
    console.print(f"correlation of ΔD and ΔM over {len(changes)} layers: {correlation(changes):+.2f}")
    console.print("(the DoRA paper, query matrices of VL-BART: full fine-tuning −0.62, DoRA −0.31, LoRA +0.83)")
