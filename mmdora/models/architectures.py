"""ARCHITECTURES: the module paths of each part (vision, projector, language, ...) of a model family.

Keys are the `model_type` of Hugging Face configs.
"""

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
    """The modules of a part: everything under `roots` except what lies under `without`, which other parts hold."""

    roots: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The root, or the innermost module around all roots. `targets` match paths relative to it."""
        first, *others = (root.split(".") for root in self.roots)
        depth = len(first) if not others else 0
        while others and all(other[: depth + 1] == first[: depth + 1] for other in others):
            depth += 1
        return ".".join(first[:depth])

    def holds(self, path: str) -> bool:
        """Return whether the module or parameter at this path belongs to the part."""
        return any(is_inside(path, r) for r in self.roots) and not any(is_inside(path, w) for w in self.without)

    def named_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (full path, parameter) for each parameter of the part once, including those tied to other parts."""
        seen: set[int] = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if self.holds(name) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def whole_modules(self, model: nn.Module) -> list[str]:
        """Return the paths of the largest modules that have weights and belong to the part entirely.

        None of them is a `ModuleList`, which PEFT refuses in `modules_to_save`.
        """
        whole: list[str] = []
        queue = list(self.roots)
        while queue:
            path = queue.pop(0)
            module = model.get_submodule(path)
            if isinstance(module, nn.ModuleList) or any(is_inside(w, path) for w in self.without):
                children = [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
                queue += [child for child in children if self.holds(child)]
            elif next(module.parameters(), None) is not None:
                whole.append(path)
        return whole


def is_inside(path: str, root: str) -> bool:
    """Return whether a dotted path is `root` or lies below it; `""` is the root of the model."""
    return root == "" or f"{path}.".startswith(f"{root}.")


@dataclass(frozen=True)
class Architecture:
    """`parts` maps each part to the dotted paths of its modules. Paths that a model does not have are ignored.

    If one part lies inside another, as the merger in Qwen's vision encoder, the outer part does not include it.
    """

    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def resolve(self, model: nn.Module) -> dict[str, Region]:
        """Return the parts that this model has, by name."""
        modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
        roots = {name: tuple(p for p in paths if p in modules) for name, paths in self.parts.items()}
        regions = {}
        for name, own in roots.items():
            others = [p for other, paths in roots.items() if other != name for p in paths]
            if own:
                regions[name] = Region(own, tuple(p for p in others if any(is_inside(p, root) for root in own)))
        return regions


ARCHITECTURES: Registry[Architecture] = Registry("architecture")
EMBEDDINGS = "embeddings"  # the input embeddings: part of `language` unless `parts` names them

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
    """Return the architecture of a model: its family's entry, or a guess by structure if there is none.

    A plain module without a Hugging Face config has no named parts; `parts` then takes dotted paths.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        return Architecture()
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if language_model := language_model_parts(model, config):
        return Architecture(language_model)
    state = state_of(model)
    if state.guessed_parts is None:  # kept on the model, so that the guess is made and logged once
        state.guessed_parts = guess_architecture(model, config).parts
        if state.guessed_parts:
            found = ", ".join(f"{part}: {' + '.join(paths)}" for part, paths in state.guessed_parts.items())
            log.warning("the family %r has no entry in ARCHITECTURES; its parts were guessed: %s", model_type, found)
    return Architecture(state.guessed_parts)


def language_model_parts(model: nn.Module, config: Any) -> dict[str, tuple[str, ...]]:
    """Return the parts of a decoder alone, whatever its family: `language` is its base model, `lm_head` its head.

    Empty for any other model.
    """
    body, head = getattr(model, "base_model", model), embeddings_of(model, "output")
    whole = getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config
    if whole or body is model or head is None or getattr(model, "main_input_name", "") != "input_ids":
        return {}
    paths = {module: path for path, module in model.named_modules()}
    return {"language": (paths[body],), "lm_head": (paths[head],)}


# Names that families give to the projector when it is inside the vision encoder.
PROJECTORS = ("merger", "projector", "connector", "aligner")


def guess_architecture(model: nn.Module, config: Any) -> Architecture:
    """Guess the parts of a vision-language model.

    Vision and language are the submodels built from the config's `vision_config` and `text_config`, the projector is
    the layers beside them (or inside the vision encoder, by name), and `lm_head` the output embeddings. Without both
    submodels the result has no parts.
    """
    parts = {}
    for part, key in (("vision", "vision_config"), ("language", "text_config")):
        if getattr(config, key, None) is not None:
            parts[part] = _submodels(model, type(getattr(config, key)))
    if not all(parts.get(part) for part in ("vision", "language")):
        return Architecture()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    parts["lm_head"] = tuple(path for path, module in model.named_modules() if module is head)
    parent = Region(parts["vision"] + parts["language"]).path
    audio_config = getattr(config, "audio_config", None)
    audio = () if audio_config is None else _submodels(model, type(audio_config))
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
    """Return the paths of the outermost submodels whose config has this type."""
    from transformers import PreTrainedModel

    paths: list[str] = []
    for path, module in model.named_modules():
        is_submodel = path and isinstance(module, PreTrainedModel) and type(module.config) is config_type
        if is_submodel and not any(is_inside(path, outer) for outer in paths):
            paths.append(path)
    return tuple(paths)


def find_parts(model: nn.Module, names: Iterable[str]) -> dict[str, Region]:
    """Return the modules of each part named in `parts`.

    The input embeddings belong to `language` unless they are named. Raises UserError for a part that the model lacks.
    """
    regions = {name: find_part(model, name) for name in names}
    own = regions.get(EMBEDDINGS)
    if own is not None:
        for name, region in regions.items():
            if name != EMBEDDINGS and region.holds(own.path) and region.roots != own.roots:
                regions[name] = replace(region, without=(*region.without, *own.roots))
    return regions


def find_part(model: nn.Module, name: str) -> Region:
    """Return the modules of one part: a part of the family, `embeddings`, a dotted module path, or `""` for the root.

    Raises UserError for a part that the model does not have.
    """
    known = architecture_of(model).resolve(model)
    if name in known:
        return known[name]
    if name == EMBEDDINGS and (table := embeddings_of(model, "input")) is not None:
        return Region(tuple(path for path, module in model.named_modules() if module is table))
    if name == "" or name in dict(model.named_modules()):
        return Region((name,))
    choices = ", ".join([*known, EMBEDDINGS]) if known else "none with a name"
    raise UserError(
        f"parts.{name}: {type(model).__name__} has no such part.{nearest(name, list(known))} "
        f"Its parts: {choices}; a dotted module path works too"
    )


def embeddings_of(model: nn.Module, which: str) -> Any:
    """Return the "input" or "output" embeddings; None if the model has none, or one per tower as CLIP has."""
    try:
        return getattr(model, f"get_{which}_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def unused_blocks(model: nn.Module, region: Region) -> list[str]:
    """Return the paths in the vision encoder that never get a gradient; an empty list for any other part.

    LLaVA's projector reads hidden state −2 of the tower, so an adapter on the last block would never be trained. No
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
    blocks: dict[str, str] = {}  # root -> its last list of `depth` equal modules, as earlier stages may have as many
    for path, module in model.named_modules():
        root = next((root for root in region.roots if is_inside(path, root)), None)
        if root is None or not region.holds(path):
            continue
        if type(module).__name__.endswith("AttentionPoolingHead"):
            unused.append(path)
        elif isinstance(module, nn.ModuleList | nn.Sequential) and len(module) == depth:
            blocks |= {root: path} if len({type(child) for child in module}) == 1 else {}
    return unused + [f"{path}.{i}" for path in blocks.values() for i in range(used, depth or 0)]
