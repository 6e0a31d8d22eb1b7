"""`mmdora merge`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmdora.cli.app import NewModel, Target, Trust, app


@app.command()
def merge(
    run: Target,
    out: NewModel,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Write a plain LoRA of this rank instead, and report its error.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Merge an adapter into a plain Hugging Face model.

    Prints the largest difference between the logits of the adapted and the merged model. If rounding does not explain
    it, the command fails, and a file MERGE_FAILED.txt marks the directory.
    """
    from mmdora.apps.check_paths import check_new_directory, check_target

    check_new_directory(out)
    check_target(run)

    from mmdora.apps.merge import MergeResult, merge_target
    from mmdora.core.console import make_console
    from mmdora.core.logs import quiet_libraries

    quiet_libraries()
    result = merge_target(run, out, lora_rank, trust_remote_code)
    console = make_console()
    if not isinstance(result, MergeResult):
        worst = max(result.errors, key=lambda path: result.errors[path])
        console.print(f"{out}: a plain LoRA of rank {lora_rank} in PEFT's layout", soft_wrap=True)
        console.print(f"relative error of the weight change (Frobenius norm): {result.error:.1%}")
        console.print(f"largest in {worst}: {result.errors[worst]:.1%}", soft_wrap=True)
        return
    low, high = result.logit_range
    console.print(f"adapter against merged and reloaded: largest logit difference {result.max_difference:.2e}")
    console.print(f"(logits from {low:.1f} to {high:.1f}, {result.dtype})")
    how = "after `import mmdora.models`" if result.needs_mmdora else "without mmdora"
    console.print(f"{out} loads with {' and '.join(result.auto_names)}, {how}", soft_wrap=True)
