"""New tokens: train their rows of the embeddings and of the head, while all other rows stay frozen.

The rows are a parameter of their own beside the frozen table, under the name that PEFT's `trainable_token_indices`
gives it. They replace the table's rows in the module's output. So the optimizer holds no state for the rest of the
vocabulary, and an adapter file holds these rows only.

A table is the input embedding [vocabulary, d] or the head (d -> vocabulary).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F

from mmdora.core.errors import UserError
from mmdora.core.sharding import check_not_split
from mmdora.models.architectures import embeddings_of, is_inside
from mmdora.models.model_state import state_of
from mmdora.models.tied_weights import holder_of, tied_weights

TOKEN_ADAPTER = "token_adapter"  # PEFT's name for the module
VALUES = f"{TOKEN_ADAPTER}.trainable_tokens_delta"  # PEFT's name for the rows; they are values, not a difference
NEW_TOKENS = "new tokens"  # name of these rows in reports and optimizer groups
TABLE_MULTIPLE = 64  # a grown table has a multiple of this many rows, which tensor cores need


class TokenRows(nn.Module):
    """The trainable rows of one table.

    `token_indices` [k] are the token ids in ascending order. `trainable_tokens_delta` [k, d] is in fp32, since small
    updates of bf16 values would round to zero.
    """

    token_indices: Tensor

    def __init__(self, ids: Sequence[int], values: Tensor):
        super().__init__()
        assert list(ids) == sorted(set(ids))
        self.register_buffer("token_indices", torch.tensor(ids, device=values.device), persistent=False)
        self.trainable_tokens_delta = nn.Parameter(values.detach().float().clone())

    @property
    def ids(self) -> list[int]:
        """The token ids in ascending order."""
        return self.token_indices.tolist()

    def forward(self, table: Any, x: Tensor, y: Tensor) -> Tensor:
        """Return the output `y` of `table` for `x` with these rows instead of the table's own."""
        values = self.trainable_tokens_delta
        if isinstance(table, nn.Embedding):
            slot = torch.searchsorted(self.token_indices, x).clamp(max=len(values) - 1)
            is_new = self.token_indices[slot] == x
            return torch.where(is_new[..., None], scaled(table, F.embedding(slot, values).to(y.dtype)), y)
        bias = None if getattr(table, "bias", None) is None else table.bias[self.token_indices]
        return y.index_copy(-1, self.token_indices, F.linear(x, values.to(x.dtype), bias).to(y.dtype))


def _replace_output(table: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """Forward hook of a table that has token rows."""
    return table.get_submodule(TOKEN_ADAPTER)(table, args[0], y)


def add_tokens(model: Any, processor: Any, tokens: Sequence[str]) -> list[int]:
    """Add new tokens to the tokenizer and the model, in place, and return their ids. Only their rows are trained later.

    The tables grow if they have no free rows. A token's row starts as the mean of the rows of the tokens that its text
    was split into before. The tokenizer never splits a new token, and keeps it in decoded text.

    Args:
        processor: A processor or a tokenizer.

    Raises:
        UserError: If a token is in the vocabulary already, the model has new tokens already, or it is sharded.
    """
    check_not_split(model, "add_tokens", "call add_tokens before fully_shard")
    if list(token_rows(model)):
        raise UserError("the model has new tokens already; add all of them in one call")
    ids, pieces = extend_tokenizer(getattr(processor, "tokenizer", processor), tokens)
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    _grow_tables(model, max(ids) + 1)
    for path, table in _tables(model).items():
        if TOKEN_ADAPTER in table._modules:
            continue  # it is tied to a table that has the rows
        with torch.no_grad():
            for name in ("weight", "bias"):
                tensor = getattr(table, name, None)
                if tensor is not None:
                    for token, piece in zip(ids, pieces, strict=True):
                        tensor[token] = tensor[piece].float().mean(0)
        put_token_rows(model, path, [ids[i] for i in order], table.weight[[ids[i] for i in order]])
        for tied in tied_tables(model, path):
            put_token_rows(model, tied, shared=table.get_submodule(TOKEN_ADAPTER))
    state_of(model).new_tokens = dict(zip(tokens, ids, strict=True))
    return ids


def extend_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Add new tokens to a tokenizer, in place.

    Returns their ids, and for each the ids that its text was split into before. Raises UserError for a token that is
    blank or in the vocabulary already.
    """
    for i, token in enumerate(tokens):
        if token in tokenizer.get_vocab() or token in tokens[:i]:
            raise UserError(f"new_tokens: {token!r} is in the vocabulary already; name each new token once")
        if not token.strip():
            raise UserError(f"new_tokens: {token!r} is blank; a token needs a text")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens], special_tokens=False)
    return tokenizer.convert_tokens_to_ids(list(tokens)), pieces


def new_tokens(model: nn.Module) -> dict[str, int]:
    """Return the tokens that `add_tokens` added to the model, with their ids."""
    return state_of(model).new_tokens


def token_rows(model: nn.Module) -> Iterator[tuple[str, TokenRows]]:
    """Yield the path of every table that has token rows, with the rows. Tied tables share one `TokenRows`."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TokenRows):
            yield path.removesuffix(f".{TOKEN_ADAPTER}"), module


def train_token_rows(model: nn.Module) -> list[str]:
    """Make all token rows trainable. Returns the paths of their tables; for tied tables only that of the input."""
    owners = token_row_owners(model)
    for rows in owners:
        rows.requires_grad_(True)
    return list(owners.values())


def token_row_owners(model: nn.Module) -> dict[TokenRows, str]:
    """Return each `TokenRows` with the path of its first table."""
    return {rows: path for path, rows in reversed(list(token_rows(model)))}


def put_token_rows(
    model: nn.Module,
    path: str,
    ids: Sequence[int] = (),
    values: Tensor | None = None,
    shared: nn.Module | None = None,
) -> None:
    """Give the table at `path` these rows: `ids` and `values` [k, d], or the `shared` rows of the table it is tied to.

    They replace the rows that it has.
    """
    table: Any = model.get_submodule(path)
    if TOKEN_ADAPTER in table._modules:
        _remove_token_rows(table)
    if shared is None:
        assert values is not None
        shared = TokenRows(ids, values.to(table.weight.device))
    table.add_module(TOKEN_ADAPTER, shared)
    table.register_forward_hook(_replace_output)


def tied_tables(model: nn.Module, path: str) -> list[str]:
    """Return the paths of the other tables that are tied to the one at `path`."""
    names = tied_weights(model).get(f"{path}.weight", [])
    tables = [holder_of(name) for name in names if name.endswith(".weight") and name != f"{path}.weight"]
    return [table for table in tables if isinstance(model.get_submodule(table), nn.Embedding | nn.Linear)]


@torch.no_grad()
def fold_token_rows(model: Any, inside: Collection[str] = ("",)) -> None:
    """Write the token rows of all tables inside these modules into the tables' weights, and remove the rows.

    Tables that share these rows with one of them are included. The tables get new weight tensors.
    """
    tied = tied_weights(model)
    for path, rows in list(token_rows(model)):
        table: Any = model.get_submodule(path)
        if not any(is_inside(path, outer) for outer in inside) or TOKEN_ADAPTER not in table._modules:
            continue  # outside, or folded with a table that it is tied to
        weight = table.weight.detach().clone()
        weight[rows.token_indices] = rows.trainable_tokens_delta.to(weight.dtype)
        parameter = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        for name in tied.get(f"{path}.weight", [f"{path}.weight"]):
            holder: Any = model.get_submodule(holder_of(name))
            if holder._modules.get(TOKEN_ADAPTER) is rows:
                holder.weight = parameter
                _remove_token_rows(holder)


def _remove_token_rows(table: nn.Module) -> None:
    del table._modules[TOKEN_ADAPTER]
    for key in [key for key, hook in table._forward_hooks.items() if hook is _replace_output]:
        del table._forward_hooks[key]


def _tables(model: Any) -> dict[str, Any]:
    """Return the input embeddings and the head, if there is one, by path. Raises UserError."""
    tables = [table for table in (embeddings_of(model, "input"), embeddings_of(model, "output")) if table is not None]
    if not tables or not all(isinstance(table, nn.Embedding | nn.Linear) for table in tables):
        raise UserError(f"new_tokens: {type(model).__name__} has no embedding table that could hold new tokens")
    return {path_of(model, table): table for table in tables}


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Return the first path of a module inside the model."""
    return next(path for path, other in model.named_modules() if other is module)


@torch.no_grad()
def _grow_tables(model: Any, size: int) -> None:
    """Grow the tables to at least `size` rows. Rows without a token are the mean of the rows before them."""
    before = len(next(iter(_tables(model).values())).weight)
    if size <= before:
        return
    with torch.random.fork_rng():
        model.resize_token_embeddings(size, pad_to_multiple_of=TABLE_MULTIPLE, mean_resizing=False)
    for table in _tables(model).values():
        for tensor in (table.weight, getattr(table, "bias", None)):
            if tensor is not None:
                tensor[before:] = tensor[:before].float().mean(0)


def scaled(table: nn.Module, y: Tensor) -> Tensor:
    """Multiply embeddings by the table's `embed_scale`, which some models of transformers have."""
    scale = getattr(table, "embed_scale", None)
    return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)
