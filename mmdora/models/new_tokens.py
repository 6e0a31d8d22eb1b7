"""New tokens: their rows of the embeddings and of the head are trained, while all other rows stay frozen.

A row lives beside its table as a parameter of its own, under the name that PEFT's `trainable_token_indices` gives it,
and takes the place of the table's row in what the module returns. So the optimizer holds nothing for the rest of the
vocabulary, and an adapter's file holds just these rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F

from mmdora.core.errors import UserError
from mmdora.models.architectures import embeddings_of, is_inside

ROWS = "token_adapter"  # PEFT's name for the module
VALUES = f"{ROWS}.trainable_tokens_delta"  # PEFT's name for the rows, which are values and not a delta
NEW_TOKENS = "new tokens"  # what tables of results call these rows
FILLED = 64  # a table grows to a multiple of it: tensor cores want that


class TokenRows(nn.Module):
    """Rows of a table that is an embedding [vocabulary, d] or a head (d → vocabulary).

    `trainable_tokens_delta` [k, d] is in fp32, since bf16 would round small updates away; `token_indices` [k] rise.
    """

    token_indices: Tensor

    def __init__(self, ids: Sequence[int], values: Tensor):
        super().__init__()
        assert list(ids) == sorted(set(ids))
        self.register_buffer("token_indices", torch.tensor(ids, device=values.device), persistent=False)
        self.trainable_tokens_delta = nn.Parameter(values.detach().float().clone())

    @property
    def ids(self) -> list[int]:
        return self.token_indices.tolist()

    def forward(self, table: Any, x: Tensor, y: Tensor) -> Tensor:
        """`y`, which `table` makes of `x`, with these rows in the place of the table's."""
        rows = self.trainable_tokens_delta
        if isinstance(table, nn.Embedding):
            slot = torch.searchsorted(self.token_indices, x).clamp(max=len(rows) - 1)
            ours = self.token_indices[slot] == x
            return torch.where(ours[..., None], scaled(table, F.embedding(slot, rows).to(y.dtype)), y)
        bias = None if getattr(table, "bias", None) is None else table.bias[self.token_indices]
        return y.index_copy(-1, self.token_indices, F.linear(x, rows.to(x.dtype), bias).to(y.dtype))


def _replace(table: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return table.get_submodule(ROWS)(table, args[0], y)


def add_tokens(model: Any, processor: Any, tokens: Sequence[str]) -> list[int]:
    """Give the tokenizer and the model new tokens, in place; returns their ids. What trains later are their rows alone.

    `processor` is a processor or a tokenizer. The tables grow where they are full. A token starts as the mean of the
    pieces that its text was split into until now; it is never split again, and stays in decoded answers. Raises
    UserError for a token that is there already.
    """
    if list(token_rows(model)):
        raise UserError("the model has new tokens already; add all of them at once")
    ids, pieces = extend_tokenizer(getattr(processor, "tokenizer", processor), tokens)
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    _grow(model, max(ids) + 1)
    tied = tied_embeddings(model)
    for path, table in _tables(model).items():
        if tied and table is model.get_output_embeddings():
            put_rows(model, path, shared=model.get_input_embeddings().get_submodule(ROWS))
            continue
        with torch.no_grad():
            for name in ("weight", "bias"):
                tensor = getattr(table, name, None)
                if tensor is not None:
                    for token, piece in zip(ids, pieces, strict=True):
                        tensor[token] = tensor[piece].float().mean(0)
        put_rows(model, path, [ids[i] for i in order], table.weight[[ids[i] for i in order]])
    model.__dict__["_mmdora_new_tokens"] = dict(zip(tokens, ids, strict=True))
    return ids


def extend_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Give a tokenizer new tokens; returns their ids, and the ids of what each was split into before. Raises
    UserError."""
    for i, token in enumerate(tokens):
        if token in tokenizer.get_vocab() or token in tokens[:i]:
            raise UserError(f"new_tokens: {token!r} is in the vocabulary already; name each new token once")
        if not token.strip():
            raise UserError(f"new_tokens: {token!r} is blank; a token needs a text of its own")
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens], special_tokens=False)
    return tokenizer.convert_tokens_to_ids(list(tokens)), pieces


def new_tokens(model: nn.Module) -> dict[str, int]:
    """The tokens that `add_tokens` gave the model, with their ids."""
    return model.__dict__.get("_mmdora_new_tokens", {})


def token_rows(model: nn.Module) -> Iterator[tuple[str, TokenRows]]:
    """Every table with rows of its own, by the table's path; tied tables share one module."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TokenRows):
            yield path.removesuffix(f".{ROWS}"), module


def train_rows(model: nn.Module) -> list[str]:
    """Let all rows be trained; returns the paths of their tables, of tied ones that of the input embeddings."""
    owners = owners_of(model)
    for rows in owners:
        rows.requires_grad_(True)
    return list(owners.values())


def owners_of(model: nn.Module) -> dict[TokenRows, str]:
    """Each set of rows with the path of its first table."""
    return {rows: path for path, rows in reversed(list(token_rows(model)))}


def put_rows(
    model: nn.Module,
    path: str,
    ids: Sequence[int] = (),
    values: Tensor | None = None,
    shared: nn.Module | None = None,
) -> None:
    """Rows for the table at `path`: these values, or those of the table that it is tied to."""
    table: Any = model.get_submodule(path)
    if shared is None:
        assert values is not None
        shared = TokenRows(ids, values.to(table.weight.device))
    table.add_module(ROWS, shared)
    table.register_forward_hook(_replace)


@torch.no_grad()
def fold_rows(model: Any, inside: Collection[str] = ("",)) -> None:
    """Write the rows of all tables inside these modules, and of those tied to them, into the tables, which become plain
    ones again with new weights."""
    tied = tied_embeddings(model)
    found = dict(token_rows(model))
    chosen = [path for path in found if any(is_inside(path, outer) for outer in inside)]
    for path in list(found) if tied and chosen else chosen:
        table: Any = model.get_submodule(path)
        rows = found[path]
        if not (tied and table is model.get_output_embeddings()):
            weight = table.weight.detach().clone()
            weight[rows.token_indices] = rows.trainable_tokens_delta.to(weight.dtype)
            table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        remove_rows(table)
    if tied and chosen:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def remove_rows(table: nn.Module) -> None:
    """The table as it was before it had rows of its own."""
    del table._modules[ROWS]
    for key in [key for key, hook in table._forward_hooks.items() if hook is _replace]:
        del table._forward_hooks[key]


def tied_embeddings(model: Any) -> bool:
    """Whether the input and the output embeddings are one parameter."""
    inside, out = embeddings_of(model, "input"), embeddings_of(model, "output")
    return inside is not None and out is not None and inside.weight is out.weight


def _tables(model: Any) -> dict[str, Any]:
    """The input embeddings and the head, where there is one, by path."""
    wanted = [table for table in (embeddings_of(model, "input"), embeddings_of(model, "output")) if table is not None]
    if not wanted or not all(isinstance(table, nn.Embedding | nn.Linear) for table in wanted):
        raise UserError(f"new_tokens: {type(model).__name__} has no table of embeddings that could take them")
    return {path_of(model, table): table for table in wanted}


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


@torch.no_grad()
def _grow(model: Any, rows: int) -> None:
    """Make room for so many tokens; the rows that no token has yet are the mean of those before."""
    before = len(next(iter(_tables(model).values())).weight)
    if rows <= before:
        return
    with torch.random.fork_rng():
        model.resize_token_embeddings(rows, pad_to_multiple_of=FILLED, mean_resizing=False)
    for table in _tables(model).values():
        for tensor in (table.weight, getattr(table, "bias", None)):
            if tensor is not None:
                tensor[before:] = tensor[:before].float().mean(0)


def scaled(table: nn.Module, y: Tensor) -> Tensor:
    """Embeddings times what transformers multiplies those of some models with."""
    scale = getattr(table, "embed_scale", None)
    return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)
