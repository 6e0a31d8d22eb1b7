"""The state that mmdora keeps on a model: one typed object for each model.

It lives in the model's `__dict__`, so that `copy.deepcopy` and `pickle` take it along with the model, and it is freed
with the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmdora.core.config import PartConfig

ATTRIBUTE = "_mmdora_state"


@dataclass(frozen=True)
class AdapterRecord:
    """The settings of one named adapter, and the weights of the base model that it trains.

    The adapter's own tensors are in the adapter layers. Weights of the base model exist once, so a model whose adapter
    trains some of them (`owned` is not empty) takes no second adapter.
    """

    parts: dict[str, PartConfig]
    modules_in_full: list[str] = field(default_factory=list)  # paths of the modules trained in full
    token_tables: list[str] = field(default_factory=list)  # paths of the tables whose rows for new tokens are trained

    @property
    def owned(self) -> list[str]:
        """Paths of the modules whose base weights this adapter trains."""
        return [*self.modules_in_full, *self.token_tables]


@dataclass(frozen=True)
class Snapshot:
    """A module with the class and attributes that it had before a reversible merge."""

    module: nn.Module
    module_class: type[nn.Module]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class MergeUndo:
    """Everything that `unmerge_adapters` restores."""

    snapshots: list[Snapshot]
    adapters: dict[str, AdapterRecord]
    tied_configs: list[Any]  # the configs that said that weights are tied


@dataclass
class ModelState:
    """The state that mmdora keeps for one model."""

    adapters: dict[str, AdapterRecord] = field(default_factory=dict)  # by name
    merge_undo: MergeUndo | None = None  # set while the model is merged reversibly
    holds_merged: bool = False  # whether the model is inside `merged_weights`
    untied: bool = False  # whether an adapter needed tensors of its own for weights that the model's config ties
    new_tokens: dict[str, int] = field(default_factory=dict)  # ids of the tokens that `add_tokens` added
    frozen_adapter: str | None = None  # the adapter directory that was added to the weights (`model.frozen_adapter`)
    guessed_parts: dict[str, tuple[str, ...]] | None = None  # for a family without an entry in ARCHITECTURES


def frozen_adapter_of(model: nn.Module) -> str | None:
    """Return the adapter directory that was added to the model's weights, if any. The model does not change."""
    state: ModelState | None = model.__dict__.get(ATTRIBUTE)
    return None if state is None else state.frozen_adapter


def state_of(model: nn.Module) -> ModelState:
    """Return the model's state; the first call creates an empty one."""
    return model.__dict__.setdefault(ATTRIBUTE, ModelState())
