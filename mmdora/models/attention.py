"""Replace `nn.MultiheadAttention` by explicit linear layers, so that adapters reach q, k, v and out.

`nn.MultiheadAttention` keeps q, k and v in one `in_proj_weight` and never calls `out_proj.forward`, so an adapter on
its children computes nothing and gets no gradient. `explicit_attention` replaces each one by four `nn.Linear` layers
around `scaled_dot_product_attention`: the same function, with layers that can be adapted.

This changes the names in the state dict. `restore_multihead` undoes it, so that a merged model has the names that its
class expects.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ExplicitAttention(nn.Module):
    """Multi-head attention with `q_proj`, `k_proj`, `v_proj` and `out_proj` as ordinary linear layers.

    It is called like the `nn.MultiheadAttention` that it replaces: `(query, key, value)` have shape [batch, tokens,
    width] if `batch_first`, else [tokens, batch, width], or [tokens, width]. It returns `(output, None)`, as with
    `need_weights=False`.

    Attributes:
        converted: Whether an adapter needed it in place of an `nn.MultiheadAttention`, which a merge restores.
    """

    converted: bool = False
    in_proj_bias = None  # keeps torch's transformer layers from their fast path, which needs `in_proj_weight`

    def __init__(self, embed_dim: int, num_heads: int, kdim: int, vdim: int, bias: bool, batch_first: bool):
        super().__init__()
        self.num_heads = num_heads
        self.batch_first = batch_first
        self.dropout = 0.0
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(kdim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(vdim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    @classmethod
    def from_multihead(cls, attention: nn.MultiheadAttention) -> ExplicitAttention:
        """Copy an attention. Raises ValueError for one that computes something else."""
        if type(attention).forward is not nn.MultiheadAttention.forward:
            raise ValueError(f"{type(attention).__name__} has a forward of its own, so it cannot be made explicit")
        if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
            raise ValueError("nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be made explicit")
        new = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.kdim,
            attention.vdim,
            bias=attention.in_proj_bias is not None,
            batch_first=attention.batch_first,
        )
        new.dropout = attention.dropout
        reference = attention.out_proj.weight
        new.to(device=reference.device, dtype=reference.dtype)
        if not reference.is_meta:
            new.load_state_dict(explicit_state_dict(attention.state_dict()))
        return new.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if need_weights:
            raise ValueError("explicit attention returns no attention weights; call it with need_weights=False")
        if query.dim() == 2:  # without a batch
            axis = 0 if self.batch_first else 1
            padding = None if key_padding_mask is None else key_padding_mask[None]
            query, key, value = (x.unsqueeze(axis) for x in (query, key, value))
            return self.forward(query, key, value, padding, attn_mask=attn_mask)[0].squeeze(axis), None
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [b, heads, n, d]
        mask = _merge_masks(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = out.transpose(1, 2).flatten(2)
        return self.out_proj(out if self.batch_first else out.transpose(0, 1)), None


def _merge_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Merge the two masks of `nn.MultiheadAttention` into one additive mask [b or 1, heads or 1, q, k].

    In its boolean masks, True means "do not attend".
    """

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(q.dtype)
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))

    merged = None
    if attn_mask is not None:
        merged = additive(attn_mask)
        if merged.dim() == 3:  # [b * heads, q, k]
            merged = merged.unflatten(0, (q.shape[0], -1))
    if key_padding_mask is not None:
        padding = additive(key_padding_mask)[:, None, None, :]
        merged = padding if merged is None else merged + padding
    return merged


def explicit_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the keys of `nn.MultiheadAttention` to those of `ExplicitAttention`, at any depth; keep other keys."""
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        prefix, _, leaf = key.rpartition(".")
        dot = f"{prefix}." if prefix else ""
        if leaf in ("in_proj_weight", "in_proj_bias"):
            kind = leaf.removeprefix("in_proj_")
            for name, chunk in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{dot}{name}_proj.{kind}"] = chunk.contiguous()
        elif leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            out[f"{dot}{leaf[0]}_proj.weight"] = tensor
        else:
            out[key] = tensor
    return out


def multihead_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Invert `explicit_state_dict`, for attentions whose q, k and v have the same input width."""
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        path, _, kind = key.rpartition(".")
        dot, _, name = path.rpartition(".")
        dot = f"{dot}." if dot else ""
        siblings = [f"{dot}{c}_proj.{kind}" for c in "qkv"]
        if name == "q_proj" and all(s in state for s in siblings):
            out[f"{dot}in_proj_{kind}"] = torch.cat([state[s] for s in siblings])
        elif name in ("k_proj", "v_proj") and siblings[0] in state:
            continue
        else:
            out[key] = tensor
    return out


def explicit_attention(model: nn.Module) -> int:
    """Replace every `nn.MultiheadAttention` inside `model`, in place. Returns how many were replaced."""
    found = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    for attention in found:
        _become(attention, ExplicitAttention.from_multihead(attention))
    return len(found)


def convert_attention(attention: nn.MultiheadAttention, explicit: ExplicitAttention) -> None:
    """Turn an attention into its explicit copy, in place, until `restore_multihead`. It stays frozen if it is."""
    if not any(parameter.requires_grad for parameter in attention.parameters()):
        explicit.requires_grad_(False)
    explicit.converted = True
    _become(attention, explicit)


def restore_multihead(attention: ExplicitAttention) -> None:
    """Turn an explicit attention back into an `nn.MultiheadAttention`, in place, with the weights that it has now."""
    q, k, v, out = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
    with torch.device("meta"):  # the weights are assigned below
        new = nn.MultiheadAttention(
            q.in_features,
            attention.num_heads,
            dropout=attention.dropout,
            bias=q.bias is not None,
            kdim=k.in_features,
            vdim=v.in_features,
            batch_first=attention.batch_first,
        )
    if new.in_proj_weight is None:
        new.q_proj_weight, new.k_proj_weight, new.v_proj_weight = q.weight, k.weight, v.weight
    else:
        new.in_proj_weight = _stacked(q.weight, k.weight, v.weight)
    if q.bias is not None:
        new.in_proj_bias = _stacked(q.bias, k.bias, v.bias)
    new.out_proj.weight, new.out_proj.bias = out.weight, out.bias
    _become(attention, new.train(attention.training))


def _stacked(*parameters: Tensor) -> nn.Parameter:
    trainable = any(parameter.requires_grad for parameter in parameters)
    return nn.Parameter(torch.cat([parameter.detach() for parameter in parameters]), requires_grad=trainable)


def _become(module: nn.Module, other: nn.Module) -> None:
    """Give a module the class and the content of another, so that every reference to it stays valid; keep its hooks."""
    hooks = {key: value for key, value in module.__dict__.items() if "_hooks" in key}
    module.__class__ = other.__class__
    module.__dict__ = {**other.__dict__, **hooks}
