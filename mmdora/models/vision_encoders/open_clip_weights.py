"""OpenCLIP's pretrained weights, or one line that says why there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdora.core.errors import UserError
from mmdora.models.loading_errors import why


def pretrained_visual(name: str, pretrained: str) -> Any:
    """open_clip's own image tower of the architecture `name` with the weights of a tag or a file. Raises UserError."""
    import open_clip

    key = f"model.vision_encoder (open_clip): cannot load {name} with pretrained {pretrained!r}"
    known = open_clip.get_pretrained_cfg(name, pretrained)
    if not known and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"{key}: it is neither a file nor one of the architecture's tags ({tags})")
    repository = str(known.get("hf_hub") or pretrained).strip("/")
    try:
        return open_clip.create_model(name, pretrained=pretrained, device="cpu").visual
    except Exception as error:  # torch's unpickler raises whatever a damaged file makes it raise
        raise UserError(f"{key}: {why(error, repository)}") from error
