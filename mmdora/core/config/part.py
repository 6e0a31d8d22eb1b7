"""`parts.<part>`: how one part of the model is fine-tuned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmdora.core.config.section import NonNegativeFloat, PositiveInt, Section

Alpha = Annotated[float, Field(gt=0)]


class PartConfig(Section):
    """How one part of the model is fine-tuned. Each method accepts some of these keys ([adapters](adapters.md))."""

    method: str = Field(description="A name that `mmdora list adapters` prints: `dora`, `lora`, `full`, `frozen` ...")
    rank: PositiveInt = Field(default=8, description="The rank r of the low-rank update.")
    alpha: Alpha = Field(default=16.0, description="The update is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="Dropout on the input of the low-rank branch."
    )
    peft_dropout: bool = Field(
        default=False,
        description="DoRA: also drop the input of the base product, as PEFT does. Costs a second matrix product.",
    )
    use_rslora: bool = Field(
        default=False, description="Scale the update by alpha / sqrt(rank) instead of alpha / rank."
    )
    targets: str | list[str] = Field(
        default="all-linear",
        description="The layers to adapt: `all-linear`, a regular expression over the path inside the part, or names "
        "that match the end of a path.",
    )
    magnitude_targets: str | list[str] | None = Field(
        default=None,
        description="DoRA: the layers that get a magnitude, written like `targets`; null means the same layers.",
    )
    exclude: str | list[str] = Field(
        default=[], description="Layers to exclude from `targets`: a regular expression, or names."
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default={}, description="Ranks of single layers: regular expression over the end of a layer's path -> rank."
    )
    alpha_pattern: dict[str, Alpha] = Field(
        default={}, description="Alphas of single layers, written like `rank_pattern`."
    )
    forward: Literal["auto", "exact", "merged"] = Field(
        default="auto",
        description="Linear layers: `exact` multiplies x by W, A and B; `merged` builds W + sBA in each pass; "
        "`auto` takes whichever needs less work.",
    )
    last_blocks: PositiveInt | None = Field(
        default=None, description="Fine-tune only the last N blocks of the part; null means the whole part."
    )
    learning_rate: NonNegativeFloat | None = Field(default=None, description="null means `training.learning_rate`.")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Layer-wise learning-rate decay: each block has this factor of the next block's rate."
    )
    weight_decay: NonNegativeFloat | None = Field(default=None, description="null means `training.weight_decay`.")
