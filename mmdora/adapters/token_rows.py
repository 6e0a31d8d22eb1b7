"""Save, check and load the token rows of an adapter directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdora.adapters.layers.base import AdapterLayer
from mmdora.adapters.peft_format import PREFIX, VALUES, Adapter
from mmdora.core.deepspeed import full_parameter, gathered, true_shape
from mmdora.core.errors import UserError
from mmdora.models.architectures import embeddings_of
from mmdora.models.new_tokens import (
    TOKEN_ADAPTER,
    path_of,
    put_token_rows,
    tied_embeddings,
    token_row_owners,
    token_rows,
)


def token_row_contents(model: nn.Module) -> dict[str, tuple[list[int], Tensor]]:
    """Return the ids [k] and values [k, d] of each table's token rows by path, gathered and on the CPU.

    Tied tables both have an entry, since PEFT does not detect for every model that they are tied.
    """
    contents = {}
    for path, rows in token_rows(model):
        contents[path] = (rows.ids, full_parameter(rows.trainable_tokens_delta).to("cpu", copy=True).contiguous())
    return contents


def token_tables(model: nn.Module, adapter: Adapter) -> list[str]:
    """Return the tables of a directory's token rows; for tied tables only that of the input embeddings."""
    owners = token_row_owners(model)
    shared = {path for path, rows in token_rows(model) if owners[rows] != path}
    return [path for path in adapter.token_rows if path not in shared]


def check_token_rows(model: nn.Module, adapter: Adapter) -> None:
    """Raise UserError unless all token rows of an adapter directory fit the model's tables."""
    existing = dict(token_rows(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, rows in adapter.token_rows.items():
        table: Any = modules.get(path)
        width = len(next(iter(rows.values())))
        where = f"{adapter.folder}: tensor {PREFIX}{path}.{VALUES}"
        if not isinstance(table, nn.Embedding | nn.Linear) or isinstance(table, AdapterLayer):
            reason = "is not in this model" if table is None else f"is a {type(table).__name__}"
            raise UserError(f"{where}: {path} {reason}; token rows need an embedding or a linear layer")
        if true_shape(table.weight)[1] != width:
            raise UserError(f"{where} has rows of {width} numbers; this model needs {true_shape(table.weight)[1]}")
        if max(rows) >= true_shape(table.weight)[0] or (path in existing and existing[path].ids != list(rows)):
            names = f" ({', '.join(adapter.new_tokens)})" if adapter.new_tokens else ""
            raise UserError(
                f"{where} has rows for the tokens {min(rows)} to {max(rows)}{names}, which this model does not have; "
                "add them first: model.new_tokens in a config, mmdora.add_tokens in Python"
            )


@torch.no_grad()
def load_token_rows(model: Any, by_table: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Copy checked token rows, by table path and token id, into the model's; tables without rows get new ones."""
    existing = dict(token_rows(model))
    inputs, outputs = (embeddings_of(model, which) for which in ("input", "output"))
    for path, rows in by_table.items():
        if path in existing:
            with gathered([existing[path].trainable_tokens_delta], write=True):
                existing[path].trainable_tokens_delta.copy_(torch.stack(list(rows.values())))
        elif TOKEN_ADAPTER not in model.get_submodule(path)._modules:
            put_token_rows(model, path, list(rows), torch.stack(list(rows.values())))
        if tied_embeddings(model) and model.get_submodule(path) is inputs and TOKEN_ADAPTER not in outputs._modules:
            put_token_rows(model, path_of(model, outputs), shared=inputs.get_submodule(TOKEN_ADAPTER))
