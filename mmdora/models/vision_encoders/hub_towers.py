"""Load vision models of transformers as towers: shared by `clip`, `siglip`, `siglip2` and `dinov2`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError
from mmdora.models.loading_errors import LOADING_ERRORS, check_complete, why


@dataclass(frozen=True)
class TowerFamily:
    """A family of towers. `image_mean` and `image_std` are defaults for checkpoints without a preprocessor."""

    type: str  # name in VISION_ENCODERS
    model_class: str  # in transformers
    config_class: str
    model_types: Collection[str]  # of configs that contain such a tower
    image_mean: list[float]
    image_std: list[float]
    overrides: dict[str, Any]  # config fields that leave out unused layers


def load_tower(
    family: TowerFamily, name: str, revision: str | None, model_config: dict[str, Any] | None
) -> tuple[PreTrainedModel, int | None]:
    """Return the tower in fp32, and the image size [pixels] of its preprocessor (None if it has none).

    `name` is the hub id or directory of the tower or of a model that contains it; `revision` is a branch, tag or commit
    on the hub. With `model_config` (fields of the tower's config) the weights are random and `name` is only a label.
    Raises UserError.
    """
    import transformers

    model_class, config_class = getattr(transformers, family.model_class), getattr(transformers, family.config_class)
    key = f"model.vision_encoder ({family.type})"
    if model_config is not None:
        if revision is not None:
            raise UserError(f"{key}: 'model_config' creates random weights, so 'pretrained' must be null")
        tower, size = model_class(config_class(**model_config, **family.overrides)), None
        mean, std = family.image_mean, family.image_std
    else:
        path = find_path(name)
        if path.exists() and revision is not None:
            raise UserError(f"{key}: {name!r} is a directory, but 'pretrained' is a revision of a hub repository")
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(path) if path.exists() else name}
        source |= {"revision": revision} if revision is not None else {}
        try:
            tower = _from_pretrained(family, model_class, source, key)
        except UserError:
            raise
        except LOADING_ERRORS as error:
            raise UserError(f"{key}: cannot load {name!r}: {why(error, name, revision)}") from error
        size, mean, std = _preprocessor(family, source, key)
    tower.config.image_mean, tower.config.image_std = list(mean), list(std)
    return tower, size


def _from_pretrained(family: TowerFamily, model_class: Any, source: dict[str, Any], key: str) -> PreTrainedModel:
    name = source["pretrained_model_name_or_path"]
    config = AutoConfig.from_pretrained(**source)
    if config.model_type not in family.model_types:
        raise UserError(
            f"{key}: {name!r} is a {config.model_type!r} model, but {family.type} towers come from "
            f"{', '.join(sorted(family.model_types))}"
        )
    config = getattr(config, "vision_config", config)
    for field, value in family.overrides.items():
        setattr(config, field, value)
    settings = {"config": config, "dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    tower, info = model_class.from_pretrained(**source, **settings)
    check_complete(key, name, info)
    return tower


def _preprocessor(family: TowerFamily, source: dict[str, Any], key: str) -> tuple[int | None, list[float], list[float]]:
    """Return image size, mean and std of the tower's image processor, or the family's defaults if it has none."""
    from transformers import AutoImageProcessor

    name, revision = source["pretrained_model_name_or_path"], source.get("revision")
    files = ("preprocessor_config.json", "processor_config.json")
    try:
        if not any(cached_file(name, f, revision=revision, _raise_exceptions_for_missing_entries=False) for f in files):
            return None, family.image_mean, family.image_std
        processor = AutoImageProcessor.from_pretrained(**source)
    except LOADING_ERRORS as error:
        reason = why(error, name, revision)
        raise UserError(f"{key}: cannot load the image processor of {name!r}: {reason}") from error
    size = (processor.crop_size if getattr(processor, "do_center_crop", False) else None) or processor.size
    mean, std = processor.image_mean or family.image_mean, processor.image_std or family.image_std
    return size.get("height") or size.get("shortest_edge"), list(mean), list(std)
