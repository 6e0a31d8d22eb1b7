"""Save, check and load the token rows of an adapter directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdora.adapters.layers.base import AdapterLayer
from mmdora.adapters.peft_format import PREFIX, VALUES, Adapter
from mmdora.core.deepspeed import full_parameter, gathered, true_shape
from mmdora.core.errors import UserError
from mmdora.core.sharding import copy_whole, is_split, whole_tensor
from mmdora.models.architectures import embeddings_of
from mmdora.models.new_tokens import TOKEN_ADAPTER, TokenRows, put_token_rows, tied_tables, token_rows
from mmdora.models.tied_weights import FLAG, holder_of


def token_row_contents(model: nn.Module) -> dict[str, tuple[list[int], Tensor]]:
    """Return the ids [k] and values [k, d] of each table's token rows by path, gathered and on the CPU.

    Tied tables both have an entry, since PEFT does not detect for every model that they are tied.
    """
    contents = {}
    for path, rows in token_rows(model):
        values: Tensor = rows.trainable_tokens_delta
        values = whole_tensor(values) if is_split(values) else full_parameter(values)
        contents[path] = (rows.ids, values.detach().to("cpu", copy=True).contiguous())
    return contents


def row_owners(model: nn.Module, adapter: Adapter, untied: Iterable[str]) -> dict[str, str]:
    """Return each table that gets token rows of an adapter directory, with the table whose rows it uses.

    Tied tables share their rows if the directory has the same for both. Without rows for the head, PEFT applies those
    of the input embeddings to a tied head. `untied` are the names of weights that will no longer be tied.

    Raises UserError for a tied head that has a low-rank adapter too.
    """
    separate = {holder_of(name) for name in untied}
    inputs = embeddings_of(model, "input")
    owners: dict[str, str] = {}
    for path in (path for path, _ in model.named_modules() if path in adapter.token_rows):
        owners.setdefault(path, path)
        for other in tied_tables(model, path):
            if other in owners or {path, other} & separate:
                continue
            if other in adapter.token_rows:
                shares = _same_rows(adapter.token_rows[path], adapter.token_rows[other])
            else:
                shares = model.get_submodule(path) is inputs and getattr(getattr(model, "config", None), FLAG, False)
            if shares:
                owners[other] = owners[path]
            if shares and other in adapter.specs:
                raise UserError(
                    f"{adapter.folder}: {other} has a low-rank adapter, and is tied to {path}, which has token rows; "
                    "only one of them is supported"
                )
    return owners


def _same_rows(rows: Mapping[int, Tensor], others: Mapping[int, Tensor]) -> bool:
    return list(rows) == list(others) and all(torch.equal(rows[i], others[i]) for i in rows)


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
def load_token_rows(model: nn.Module, by_table: Mapping[str, Mapping[int, Tensor]], owners: Mapping[str, str]) -> None:
    """Copy checked token rows, by table path and token id, into the model's; tables without rows get new ones.

    `owners` are the tables that get rows, with the table whose rows they use.
    """
    existing = dict(token_rows(model))
    written: set[TokenRows] = set()
    for path in (path for path, owner in owners.items() if path == owner):
        ids, values = list(by_table[path]), torch.stack(list(by_table[path].values()))
        rows = existing.get(path)
        if rows is None or rows in written:  # none yet, or those of a table that has other rows now
            put_token_rows(model, path, ids, values)
        else:
            with gathered([rows.trainable_tokens_delta], write=True):
                copy_whole(rows.trainable_tokens_delta, values)
            written.add(rows)
    for path, owner in owners.items():
        shared: Any = model.get_submodule(owner).get_submodule(TOKEN_ADAPTER)
        if model.get_submodule(path)._modules.get(TOKEN_ADAPTER) is not shared:
            put_token_rows(model, path, shared=shared)
