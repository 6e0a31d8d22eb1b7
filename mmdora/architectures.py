"""ARCHITECTURES: for a model family, where its parts live. Keyed by the family's `model_type` in Hugging Face
configs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from mmdora.errors import UserError
from mmdora.registry import Registry, nearest


@dataclass(frozen=True)
class Architecture:
    """`parts` maps a part's name to the dotted path of its module; the first path that the model has counts."""

    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def resolve(self, model: nn.Module) -> dict[str, str]:
        """The parts that this model has, as name → path."""
        modules = dict(model.named_modules())
        return {
            name: path
            for name, paths in self.parts.items()
            for path in [next((p for p in paths if p in modules), None)]
            if path is not None
        }


ARCHITECTURES: Registry[Architecture] = Registry("architecture")

LLAVA_LIKE = Architecture(
    {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model",),
        "lm_head": ("lm_head",),
    }
)
for _name in ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava"):
    ARCHITECTURES.register(_name)(LLAVA_LIKE)


def architecture_of(model: nn.Module) -> Architecture:
    """The model's family; one without parts for a plain module or an unknown family, whose parts then go by dotted
    path."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return ARCHITECTURES[model_type] if isinstance(model_type, str) and model_type in ARCHITECTURES else Architecture()


def find_part(model: nn.Module, name: str) -> str:
    """The module path of a part named in `parts`: one of the family's own, a dotted path, or `""` for the root."""
    known = architecture_of(model).resolve(model)
    if name in known:
        return known[name]
    if name == "" or name in dict(model.named_modules()):
        return name
    choices = ", ".join(known) or "none by name"
    raise UserError(
        f"parts.{name}: {type(model).__name__} has no such part.{nearest(name, list(known))} "
        f"Its parts: {choices}; a dotted module path works too"
    )


def unused_blocks(model: nn.Module, vision_path: str) -> list[str]:
    """Paths of the tower's blocks behind the hidden state that the projector reads: they never get a gradient.

    LLaVA reads layer −2, so the last block computes nothing that counts, and an adapter on it would never learn.
    """
    config = getattr(model, "config", None)
    layer = getattr(config, "vision_feature_layer", None)
    depth = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if layer is None or depth is None:
        return []
    layers = [layer] if isinstance(layer, int) else list(layer)
    used = max(index if index >= 0 else depth + 1 + index for index in layers)
    return [
        f"{vision_path}.{path}.{index}"
        for path, module in model.get_submodule(vision_path).named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == depth
        for index in range(used, depth)
    ]
