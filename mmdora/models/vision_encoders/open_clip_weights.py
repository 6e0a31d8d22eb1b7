"""Load OpenCLIP's pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdora.core.errors import UserError
from mmdora.models.loading_errors import why


def pretrained_visual(name: str, pretrained: str) -> Any:
    """Return open_clip's image tower of an architecture, with the weights of a tag or file. Raises UserError."""
    import open_clip

    key = f"model.vision_encoder (open_clip): cannot load {name} with pretrained {pretrained!r}"
    known = open_clip.get_pretrained_cfg(name, pretrained)
    if not known and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"{key}: it is neither a file nor a tag of this architecture ({tags})")
    repository = str(known.get("hf_hub") or pretrained).strip("/")
    try:
        return open_clip.create_model(name, pretrained=pretrained, device="cpu").visual
    except Exception as error:  # torch's unpickler may raise any exception for a damaged file
        raise UserError(f"{key}: {why(error, repository)}") from error
