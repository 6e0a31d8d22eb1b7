"""Tied weights: parameters that several modules hold, as the input embeddings and the head of many language models.

transformers ties them when a model is loaded, if `tie_word_embeddings` is set in its config. A model whose tied weights
were given different values must say in its config that they are no longer tied, or its saved files load as another
model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from mmdora.models.architectures import is_inside
from mmdora.models.model_state import state_of

FLAG = "tie_word_embeddings"


def tied_weights(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of each tied parameter, one for each module that holds it, by each of its names.

    A module that the model reaches by several paths counts once.
    """
    names: dict[str, int] = {}  # every name -> id of the parameter
    holders: dict[int, dict[tuple[int, str], str]] = {}  # id of the parameter -> (module, attribute) -> first name
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            names[name] = id(parameter)
            holders.setdefault(id(parameter), {}).setdefault((id(module), name.rpartition(".")[2]), name)
    return {name: list(holders[key].values()) for name, key in names.items() if len(holders[key]) > 1}


def with_tied_modules(model: nn.Module, modules: list[str], untied: Collection[str] = ()) -> list[str]:
    """Return these modules and those outside of them that hold one of their parameters: training one trains both.

    `untied` are the names of parameters that will no longer be tied.
    """
    found = list(modules)
    for name, tied in tied_weights(model).items():
        if name not in untied and any(is_inside(name, path) for path in modules):
            others = [other for other in tied if other not in untied]
            found += [holder_of(other) for other in others if not any(is_inside(other, path) for path in found)]
    return found


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Give each of these parameters a tensor of its own, a copy of the shared one, and set the model's config so."""
    names = list(names)
    for name in names:
        module, leaf = model.get_submodule(holder_of(name)), name.rpartition(".")[2]
        shared = module._parameters[leaf]
        assert shared is not None
        module._parameters[leaf] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    if names and clear_tied_flags(model):
        state_of(model).untied = True


def untie_all(model: nn.Module) -> None:
    """Give every name of a tied parameter a tensor of its own."""
    groups = {tuple(group) for group in tied_weights(model).values()}
    untie(model, [name for group in groups for name in group[1:]])


def clear_tied_flags(model: nn.Module) -> list[Any]:
    """Set `tie_word_embeddings` to False in the model's configs, and return the configs that had it set."""
    changed = [config for config in _configs(model) if getattr(config, FLAG, False)]
    for config in changed:
        setattr(config, FLAG, False)
    return changed


def holder_of(name: str) -> str:
    """Return the path of the module that holds the parameter of this name."""
    return name.rpartition(".")[0]


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield the configs of the model and of its submodels, and those nested in them."""
    queue = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")]
    seen: set[int] = set()
    while queue:
        config = queue.pop()
        if id(config) not in seen:
            seen.add(id(config))
            yield config
            queue += [value for value in vars(config).values() if hasattr(value, "to_dict")]
