"""Optimizer parameter groups: learning rate and weight decay per part."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmdora.core.config import PartConfig, RunConfig
from mmdora.core.deepspeed import true_shape
from mmdora.models.architectures import Region, find_parts
from mmdora.models.blocks import rate_factors
from mmdora.models.new_tokens import NEW_TOKENS, VALUES
from mmdora.models.tied_weights import tied_weights


def optimizer_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Return AdamW groups with each part's learning rate (per block with `layer_decay`) and weight decay.

    Norms, biases, magnitudes and the rows of new tokens get no weight decay.
    """
    settings = config.training
    regions = find_parts(model, config.parts)
    decays = {part: options.layer_decay for part, options in config.parts.items() if options.layer_decay != 1}
    factors = {part: rate_factors(model, part, regions[part], decay) for part, decay in decays.items()}
    tied = tied_weights(model)
    groups: dict[tuple[str, bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(VALUES):
            part, options = NEW_TOKENS, PartConfig(method="full", weight_decay=0.0)
        else:
            part, name = _part_of(tied.get(name, [name]), regions, config)
            options = config.parts[part]
        is_matrix = len(true_shape(parameter)) >= 2
        decayed = is_matrix and ".lora_magnitude_vector." not in name  # a convolution's magnitude is [1, out, 1, 1]
        rate = settings.learning_rate if options.learning_rate is None else options.learning_rate
        rate *= factors[part][name] if part in factors else 1.0
        decay = settings.weight_decay if options.weight_decay is None else options.weight_decay
        group = {"params": [], "lr": rate, "weight_decay": decay if decayed else 0.0, "name": part}
        groups.setdefault((part, decayed, rate), group)["params"].append(parameter)
    return list(groups.values())


def _part_of(names: list[str], regions: dict[str, Region], config: RunConfig) -> tuple[str, str]:
    """Return the part that trains a parameter, and the parameter's name there. A tied weight has several names."""
    inside = {part: name for part, region in regions.items() for name in names if region.holds(name)}
    if len(names) > 1:  # parts with low-rank adapters do not train it
        inside = {p: name for p, name in inside.items() if config.parts[p].method == "full"} or inside
    part = max(inside, key=lambda p: len(regions[p].path))
    return part, inside[part]
