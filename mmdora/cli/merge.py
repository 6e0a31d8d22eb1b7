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

    Prints the largest difference between the logits of the adapted and the merged model.
    """
    from mmdora.apps.check_paths import check_new_directory, check_target

    check_new_directory(out)
    check_target(run)

    from mmdora.apps.merge import run as merge_run

    merge_run(run, out, lora_rank, trust_remote_code)
