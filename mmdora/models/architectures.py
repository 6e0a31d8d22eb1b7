"""ARCHITECTURES: for a model family, where its parts live. Keyed by the family's `model_type` in Hugging Face
configs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mmdora.core.errors import UserError
from mmdora.core.registry import Registry, nearest
from mmdora.models.model_state import state_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Region:
    """The modules that make up a part: all at `roots`, without what other parts hold inside them (`without`)."""

    roots: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The one root, or the innermost module around all of them; paths inside the part start here."""
        first, *others = (root.split(".") for root in self.roots)
        depth = len(first) if not others else 0
        while others and all(other[: depth + 1] == first[: depth + 1] for other in others):
            depth += 1
        return ".".join(first[:depth])

    def holds(self, path: str) -> bool:
        """Whether a module or parameter belongs to the part."""
        return any(is_inside(path, r) for r in self.roots) and not any(is_inside(path, w) for w in self.without)

    def named_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """By full path, each once, a tied one too where another part has it first."""
        seen: set[int] = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if self.holds(name) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def whole_modules(self, model: nn.Module) -> list[str]:
        """The largest modules with weights that belong to the part with all that they hold; none is a mere list of
        modules, which PEFT refuses in `modules_to_save`."""
        found: list[str] = []
        waiting = list(self.roots)
        while waiting:
            path = waiting.pop(0)
            module = model.get_submodule(path)
            if isinstance(module, nn.ModuleList) or any(is_inside(w, path) for w in self.without):
                children = [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
                waiting += [child for child in children if self.holds(child)]
            elif next(module.parameters(), None) is not None:
                found.append(path)
        return found


def is_inside(path: str, root: str) -> bool:
    return root == "" or f"{path}.".startswith(f"{root}.")


@dataclass(frozen=True)
class Architecture:
    """`parts` maps a part's name to the dotted paths of its modules; those that the model has count.

    One part may live inside another, as the merger of Qwen's vision encoder does: the outer is then without it.
    """

    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def resolve(self, model: nn.Module) -> dict[str, Region]:
        """The parts that this model has, by name."""
        modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
        roots = {name: tuple(p for p in paths if p in modules) for name, paths in self.parts.items()}
        regions = {}
        for name, own in roots.items():
            others = [p for other, paths in roots.items() if other != name for p in paths]
            if own:
                regions[name] = Region(own, tuple(p for p in others if any(is_inside(p, root) for root in own)))
        return regions


ARCHITECTURES: Registry[Architecture] = Registry("architecture")
EMBEDDINGS = "embeddings"  # a part of every family: inside the language model, but apart from it where it is named

LLAVA_LIKE = Architecture(
    {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model",),
        "lm_head": ("lm_head",),
    }
)
VIDEO_LLAVA = Architecture(LLAVA_LIKE.parts | {"vision": ("model.image_tower", "model.video_tower")})
QWEN_LIKE = Architecture(
    {
        "vision": ("model.visual",),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "language": ("model.language_model",),
        "lm_head": ("lm_head",),
    }
)
IDEFICS_LIKE = Architecture(
    {
        "vision": ("model.vision_model",),
        "projector": ("model.connector",),
        "language": ("model.text_model",),
        "lm_head": ("lm_head",),
    }
)
for _entry, _names in (
    (LLAVA_LIKE, ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava")),
    (LLAVA_LIKE, ("llava_resampler", "internvl", "paligemma", "gemma3")),
    (VIDEO_LLAVA, ("video_llava",)),
    (QWEN_LIKE, ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")),
    (IDEFICS_LIKE, ("idefics3", "smolvlm")),
):
    for _name in _names:
        ARCHITECTURES.register(_name)(_entry)


def architecture_of(model: nn.Module) -> Architecture:
    """The model's family; a guess for one without an entry; one without parts for a plain module, whose parts then go
    by dotted path."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        return Architecture()
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    state = state_of(model)
    if state.guessed_parts is None:  # kept on the model, so that the guess is made and logged once
        state.guessed_parts = guess_architecture(model, config).parts
        if state.guessed_parts:
            found = ", ".join(f"{part}: {' + '.join(paths)}" for part, paths in state.guessed_parts.items())
            log.warning("the family %r has no entry in ARCHITECTURES; its parts were guessed: %s", model_type, found)
    return Architecture(state.guessed_parts)


# What families call the layers between the towers, where these are inside the vision encoder.
PROJECTORS = ("merger", "projector", "connector", "aligner")


def guess_architecture(model: nn.Module, config: Any) -> Architecture:
    """The parts of a model of vision and text, by its structure: the submodels built from its config's vision and text
    configs, the layers beside them, and the output embeddings."""
    parts = {}
    for part, key in (("vision", "vision_config"), ("language", "text_config")):
        if getattr(config, key, None) is not None:
            parts[part] = _submodels(model, type(getattr(config, key)))
    if not all(parts.get(part) for part in ("vision", "language")):
        return Architecture()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    parts["lm_head"] = tuple(path for path, module in model.named_modules() if module is head)
    parent = Region(parts["vision"] + parts["language"]).path
    heard = getattr(config, "audio_config", None)
    audio = () if heard is None else _submodels(model, type(heard))
    taken = [path for paths in (*parts.values(), audio) for path in paths]
    beside = [
        f"{parent}.{name}".lstrip(".")
        for name, module in model.get_submodule(parent).named_children()
        if not isinstance(module, nn.Embedding) and any(p.dim() > 1 for p in module.parameters())
    ]
    within = [
        f"{path}.{name}"
        for path in parts["vision"]
        for name, _ in model.get_submodule(path).named_children()
        if any(word in name for word in PROJECTORS)
    ]
    projector = [path for path in beside if not any(is_inside(path, t) or is_inside(t, path) for t in taken)] or within
    return Architecture({part: paths for part, paths in (parts | {"projector": tuple(projector)}).items() if paths})


def _submodels(model: nn.Module, config_type: type) -> tuple[str, ...]:
    """The outermost submodels whose config is of this type."""
    from transformers import PreTrainedModel

    found: list[str] = []
    for path, module in model.named_modules():
        is_submodel = path and isinstance(module, PreTrainedModel) and type(module.config) is config_type
        if is_submodel and not any(is_inside(path, outer) for outer in found):
            found.append(path)
    return tuple(found)


def find_parts(model: nn.Module, names: Iterable[str]) -> dict[str, Region]:
    """Where the parts named in `parts` live. The input embeddings belong to the language model unless they are
    named. Raises UserError."""
    regions = {name: find_part(model, name) for name in names}
    own = regions.get(EMBEDDINGS)
    if own is not None:
        for name, region in regions.items():
            if name != EMBEDDINGS and region.holds(own.path) and region.roots != own.roots:
                regions[name] = replace(region, without=(*region.without, *own.roots))
    return regions


def find_part(model: nn.Module, name: str) -> Region:
    """Where one part lives: one of the family's own, `embeddings` (the input's), a dotted module path, or `""` for the
    root. Raises UserError."""
    known = architecture_of(model).resolve(model)
    if name in known:
        return known[name]
    if name == EMBEDDINGS and (table := embeddings_of(model, "input")) is not None:
        return Region(tuple(path for path, module in model.named_modules() if module is table))
    if name == "" or name in dict(model.named_modules()):
        return Region((name,))
    choices = ", ".join([*known, EMBEDDINGS]) if known else "none by name"
    raise UserError(
        f"parts.{name}: {type(model).__name__} has no such part.{nearest(name, list(known))} "
        f"Its parts: {choices}; a dotted module path works too"
    )


def embeddings_of(model: nn.Module, which: str) -> Any:
    """The "input" or the "output" embeddings; None where the model has none, or one for each of its towers, as CLIP."""
    try:
        return getattr(model, f"get_{which}_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def unused_blocks(model: nn.Module, region: Region) -> list[str]:
    """Paths of what computes nothing that the projector reads, where the part is the vision encoder: no gradient ever.

    LLaVA reads layer −2 of the tower, so the last block is for nothing, and an adapter on it would never learn; no
    family reads the pooled output of SigLIP's attention head.
    """
    if architecture_of(model).resolve(model).get("vision") != region:
        return []
    config = getattr(model, "config", None)
    layer = getattr(config, "vision_feature_layer", None)
    depth = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    used = depth or 0
    if layer is not None and depth is not None:
        layers = [layer] if isinstance(layer, int) else list(layer)
        used = max(index if index >= 0 else depth + 1 + index for index in layers)
    unused = []
    blocks: dict[str, str] = {}  # by root: the last list of so many equal modules, since stages may have as many
    for path, module in model.named_modules():
        root = next((root for root in region.roots if is_inside(path, root)), None)
        if root is None or not region.holds(path):
            continue
        if type(module).__name__.endswith("AttentionPoolingHead"):
            unused.append(path)
        elif isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == depth:
            blocks |= {root: path} if len({type(child) for child in module}) == 1 else {}
    return unused + [f"{path}.{i}" for path in blocks.values() for i in range(used, depth or 0)]
