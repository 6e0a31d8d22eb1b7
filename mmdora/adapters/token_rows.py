"""The rows of new tokens in an adapter directory: checked, loaded and saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmdora.adapters.layers.base import AdapterLayer
from mmdora.adapters.peft_format import PREFIX, VALUES, Adapter
from mmdora.core.deepspeed import full_parameter, gathered, true_shape
from mmdora.core.errors import UserError
from mmdora.models.architectures import embeddings_of
from mmdora.models.new_tokens import ROWS, owners_of, path_of, put_rows, tied_embeddings, token_rows


def rows_contents(model: nn.Module) -> dict[str, tuple[list[int], Tensor]]:
    """The ids and values [k, d] of each table's rows, gathered and on the CPU; tied tables each have theirs, since PEFT
    does not find out for every model that they are tied."""
    found = {}
    for path, rows in token_rows(model):
        found[path] = (rows.ids, full_parameter(rows.trainable_tokens_delta).to("cpu", copy=True).contiguous())
    return found


def rows_of(model: nn.Module, adapter: Adapter) -> list[str]:
    """The tables of a directory's rows as `train_rows` would name them."""
    owners = owners_of(model)
    shared = {path for path, rows in token_rows(model) if owners[rows] != path}
    return [path for path in adapter.rows if path not in shared]


def check_rows(model: nn.Module, adapter: Adapter) -> None:
    """Raise UserError unless the model has a place for all rows of an adapter directory."""
    here = dict(token_rows(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, rows in adapter.rows.items():
        table: Any = modules.get(path)
        width = len(next(iter(rows.values())))
        where = f"{adapter.folder}: tensor {PREFIX}{path}.{VALUES}"
        if not isinstance(table, nn.Embedding | nn.Linear) or isinstance(table, AdapterLayer):
            there = "is not in this model" if table is None else f"is a {type(table).__name__}, which can have no rows"
            raise UserError(f"{where}: {path} {there}")
        if true_shape(table.weight)[1] != width:
            raise UserError(f"{where} has rows of {width} numbers; this model needs {true_shape(table.weight)[1]}")
        missing = max(rows) >= true_shape(table.weight)[0] or (path in here and here[path].ids != list(rows))
        if missing:
            named = f" ({', '.join(adapter.new_tokens)})" if adapter.new_tokens else ""
            raise UserError(
                f"{where} is of tokens {min(rows)} to {max(rows)}{named}, which are not those of this model; give "
                "them to it first: model.new_tokens in a config, mmdora.add_tokens in Python"
            )


@torch.no_grad()
def load_rows(model: Any, adapter: Adapter) -> None:
    """Put the rows of a checked directory on the model, or copy them where it has such rows."""
    here = dict(token_rows(model))
    inside, out = (embeddings_of(model, which) for which in ("input", "output"))
    for path, rows in adapter.rows.items():
        if path in here:
            with gathered([here[path].trainable_tokens_delta], write=True):
                here[path].trainable_tokens_delta.copy_(torch.stack(list(rows.values())))
        elif ROWS not in model.get_submodule(path)._modules:
            put_rows(model, path, list(rows), torch.stack(list(rows.values())))
        if tied_embeddings(model) and model.get_submodule(path) is inside and ROWS not in out._modules:
            put_rows(model, path_of(model, out), shared=inside.get_submodule(ROWS))
