"""The README.md of a saved model: how to load it, and which models it was made from."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from mmdora.core.config import ModelConfig
from mmdora.core.config_files import find_path
from mmdora.models.language_models import auto_names, is_language_model

NEEDS_MMDORA = """\
Some of its classes are part of mmdora, not of transformers. **Import `mmdora.models` before you load the model**: that
registers the classes with the Auto classes. Without mmdora the model does not load."""
WITHOUT_MMDORA = "transformers loads the model without mmdora."


def describe_parts(config: ModelConfig) -> dict[str, str]:
    """Return what a composed model is made of, as its config.json keeps it under `composed_of`.

    Of a local path only the last component is kept, so that a published model names no path of this machine.
    """
    assert config.vision_encoder is not None
    assert config.language_model is not None
    encoder = config.vision_encoder
    parts = {"vision_encoder_type": encoder.type, "vision_encoder": public_name(encoder.name)}
    if encoder.pretrained is not None:
        parts["vision_encoder_pretrained"] = public_name(encoder.pretrained)
    return parts | {"projector": config.projector, "language_model": public_name(config.language_model.path)}


def write_model_card(model: PreTrainedModel, folder: Path, needs_mmdora: bool) -> None:
    """Write README.md into the folder of a saved model, unless the folder has one."""
    file = folder / "README.md"
    if not file.exists():
        file.write_text(_model_card(model, folder.resolve().name, needs_mmdora), encoding="utf-8")


def _model_card(model: PreTrainedModel, name: str, needs_mmdora: bool) -> str:
    parts: dict[str, str] = getattr(model.config, "composed_of", None) or {}
    base = public_name(getattr(model.config, "_name_or_path", "") or "")
    names = [parts["vision_encoder"], parts["language_model"]] if parts else [base]
    on_hub = [model_id for model_id in names if model_id.count("/") == 1]
    task = "text-generation" if is_language_model(model.config) else "image-text-to-text"
    metadata = ["library_name: transformers", f"pipeline_tag: {task}"]
    metadata += ["base_model:", *(f"- {model_id}" for model_id in on_hub)] if on_hub else []
    made_from = [f"Base model: `{base}`"] if base else []
    if parts:
        pretrained = parts.get("vision_encoder_pretrained")
        weights = f", pretrained `{pretrained}`" if pretrained else ""
        made_from = [
            "It is composed of:\n",
            f"- vision encoder: `{parts['vision_encoder']}` (type `{parts['vision_encoder_type']}`{weights})",
            f"- projector: `{parts['projector']}`",
            f"- language model: `{parts['language_model']}`",
        ]
    auto_model, auto_processor = auto_names(model.config)
    variable = "tokenizer" if auto_processor == "AutoTokenizer" else "processor"
    lines = [
        *("---", *metadata, "---", f"# {name}\n"),
        f"A `{type(model).__name__}`, saved by mmdora.\n",
        f"{NEEDS_MMDORA if needs_mmdora else WITHOUT_MMDORA}\n",
        "```python",
        *(["import mmdora.models"] if needs_mmdora else []),
        f"from transformers import {auto_model}, {auto_processor}",
        f'model = {auto_model}.from_pretrained("{name}")',
        f'{variable} = {auto_processor}.from_pretrained("{name}")',
        "```\n",
        *made_from,
    ]
    return "\n".join(lines).rstrip() + "\n"


def public_name(name: str) -> str:
    """Return a hub id, tag or architecture as it is, and only the last component of a local path."""
    is_local = find_path(name).exists() or name.startswith(("/", "./", "../", "~"))
    return Path(name).name if is_local else name
