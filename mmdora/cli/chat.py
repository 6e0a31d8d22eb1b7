"""`mmdora chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdora.cli.app import Target, Trust, app


@app.command()
def chat(
    target: Target,
    image: Annotated[list[Path] | None, typer.Option(help="Image to ask about; repeatable.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="Video to ask about; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer, in tokens.")] = 256,
    trust_remote_code: Trust = False,
) -> None:
    """Chat with a run or a model in the terminal."""
    from mmdora.apps.check_paths import check_files, check_target

    check_files([*(image or []), *(video or [])])
    check_target(target)

    from mmdora.apps.chat import run

    run(target, image or [], video or [], max_new_tokens, trust_remote_code)
