"""What becomes of trained adapters: merged into the weights and out again, several as one, or a plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdora.adapters import AdapterLayer, LowRankSpec, adapter_layers
from mmdora.adapters.injection import AdapterRecord, check_new_name, records, set_adapter
from mmdora.adapters.layers.experts import AdaptedExperts
from mmdora.adapters.layers.siblings import share_reads
from mmdora.adapters.ops.functional import dora_gain
from mmdora.adapters.peft_format import PREFIX, VALUES, metadata, peft_config
from mmdora.adapters.save_load import write_adapter
from mmdora.adapters.token_rows import rows_contents
from mmdora.core.errors import UserError
from mmdora.models.new_tokens import fold_rows, new_tokens, tied_embeddings, token_rows

# A row whose weights the sum scales by less than this has no direction left to write the sum with.
LEAST_SCALE = 1e-3


def merge_adapters(model: nn.Module, name: str | None = None, reversible: bool = False) -> nn.Module:
    """Fold the active adapter (or `name`) into the weights, in place, and return the model without adapter code.

    With `reversible` the adapters and the original weights are kept aside on the model (as much memory again as the
    adapted layers have), and `unmerge_adapters` brings them back bit by bit. Where one of two tied embeddings was
    adapted, they are no longer tied, and the model's config says so.
    """
    if reversible and "_mmdora_merged" in model.__dict__:
        raise UserError("the model is merged already, and could not be unmerged twice: unmerge_adapters(model) first")
    if name is not None:
        set_adapter(model, name)
    tied = tied_embeddings(model)
    aside = []
    for _, layer in list(adapter_layers(model)):
        changed = [layer, layer.block] if isinstance(layer, AdaptedExperts) else [layer]
        aside += [_snapshot(module) for module in changed] if reversible else []
        if layer.active is not None:
            layer.merge(layer.active)
        else:
            layer.unwrap()
    aside += [_snapshot(model.get_submodule(path)) for path, _ in token_rows(model)] if reversible else []
    fold_rows(model)
    if reversible:
        model.__dict__["_mmdora_merged"] = (aside, dict(records(model)), tied)
    if tied and not tied_embeddings(model):
        _set_tied(model, False)
    records(model).clear()
    return model


def unmerge_adapters(model: nn.Module) -> nn.Module:
    """Undo `merge_adapters(model, reversible=True)`: the same tensors as before. Raises UserError where none was."""
    if "_mmdora_merged" not in model.__dict__:
        raise UserError("nothing to unmerge: merge with merge_adapters(model, reversible=True)")
    aside, before, tied = model.__dict__.pop("_mmdora_merged")
    for module, kind, state in reversed(aside):
        training = module.training
        module.__class__, module.__dict__ = kind, state
        module.train(training)
    records(model).update(before)
    share_reads(model)
    if tied:
        _set_tied(model, True)
    return model


def _snapshot(module: nn.Module) -> tuple[nn.Module, type[nn.Module], dict[str, Any]]:
    held = ("_parameters", "_modules", "_buffers", "_forward_hooks")
    state = {k: v.copy() if k in held else v for k, v in module.__dict__.items()}
    return module, type(module), state


def _set_tied(model: nn.Module, tied: bool) -> None:
    config: Any = model.config
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        each.tie_word_embeddings = tied


@torch.no_grad()
def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """A new adapter `name` that is the weighted sum of others: W' = W + Σ wᵢ(Wᵢ' − W), to rounding.

    No product is approximated: the new rank of a layer is the sum of the others'. With gᵢ = mᵢ / ‖W + sᵢBᵢAᵢ‖ and
    d = 1 + Σ wᵢ(gᵢ − 1), the sum is d ⊙ (W + Σ (wᵢsᵢgᵢ / d) ⊙ BᵢAᵢ), which is DoRA's form again. Raises UserError for
    an unknown name, and for weights under which a row all but vanishes.
    """
    unknown = [n for n in weights if n not in records(model)]
    if unknown or not weights:
        known = ", ".join(records(model)) or "none"
        raise UserError(f"the model has no adapter {unknown[0]!r}; it has: {known}" if unknown else "no adapter named")
    check_new_name(model, name)
    built = {path: sums for path, layer in adapter_layers(model) if (sums := _sum(path, layer, weights)) is not None}
    for path, layer in list(adapter_layers(model)):
        if path not in built:
            continue
        spec, a, b, scale = built[path]
        layer.add_adapter(name, spec)
        tensors, shapes = layer.adapter_tensors(name), layer.shapes(layer, spec.rank)
        if spec.rank:
            suffixes = [f"{attribute}{layer.file_suffix}" for attribute in layer.low_rank]
            tensors[suffixes[0]].copy_(a.view(shapes.a))
            tensors[suffixes[1]].copy_(b.view(shapes.b))
        if spec.use_dora:
            tensors["lora_magnitude_vector"].copy_((scale * layer.fresh_norm(name)).view(shapes.magnitude))
    records(model)[name] = AdapterRecord({})
    set_adapter(model, name)


def _sum(
    path: str, layer: AdapterLayer, weights: Mapping[str, float]
) -> tuple[LowRankSpec, Tensor, Tensor, Tensor] | None:
    """The combined adapter of one layer: its settings, A, B, and the scale of its rows."""
    names = [name for name in weights if name in layer.specs]
    if not names:
        return None
    dora = any(layer.specs[name].use_dora for name in names)
    gains: dict[str, Tensor] = {}
    for name in names:
        magnitude = layer.magnitude(name)
        if magnitude is not None:
            gains[name] = dora_gain(magnitude, layer.fresh_norm(name))
    scale = torch.ones_like(layer.fresh_norm(names[0]))
    for name, gain in gains.items():
        scale += weights[name] * (gain - 1)
    if scale.abs().min() < LEAST_SCALE:
        raise UserError(f"{path}: under the weights {dict(weights)} a row of W all but vanishes from the sum")
    left, right = [], []
    for name in names:
        a, b = layer.factors(name)
        if a is not None and b is not None:
            factor = weights[name] * layer.specs[name].scale * gains.get(name, torch.ones_like(scale)) / scale
            left.append(a.float())
            right.append(factor[..., None] * b.float())
    rank = sum(a.shape[-2] for a in left)
    spec = LowRankSpec(rank, alpha=max(rank, 1), use_dora=dora)
    nothing = scale.new_empty(0)
    return spec, torch.cat(left, -2) if left else nothing, torch.cat(right, -1) if right else nothing, scale


@dataclass(frozen=True)
class LoRAExport:
    """How far a plain LoRA falls short: ‖ΔW − BA‖ / ‖ΔW‖ (Frobenius), by layer and over all."""

    rank: int
    errors: dict[str, float]
    error: float


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | Path, rank: int, name: str = "default") -> LoRAExport:
    """Write the adapter as a plain LoRA in PEFT's layout, for servers that know no DoRA: the truncated SVD of what it
    adds to every weight.

    DoRA's change has full rank in general, so this is an approximation; the report says how good. Raises UserError
    where a layer has no plain LoRA in PEFT.
    """
    if name not in records(model):
        raise UserError(f"the model has no adapter {name!r}; it has: {', '.join(records(model)) or 'none'}")
    if rank < 1:
        raise UserError(f"the rank of a LoRA is at least 1, not {rank}")
    tensors: dict[str, Tensor] = {}
    specs: dict[str, LowRankSpec] = {}
    missed: dict[str, tuple[float, float]] = {}
    for path, layer in adapter_layers(model, name):
        if not layer.in_peft:
            raise UserError(f"{path}: PEFT has no plain LoRA for this {type(layer).__name__}")
        change = layer.merged(name) - layer.matrix().float()
        a, b = _truncated(change, rank)
        shapes = layer.shapes(layer, a.shape[0])
        for attribute, tensor, shape in zip(layer.low_rank, (a, b), shapes[:2], strict=True):
            tensors[f"{PREFIX}{path}.{attribute}{layer.file_suffix}"] = tensor.reshape(shape).cpu().contiguous()
        specs[path] = LowRankSpec(a.shape[0], alpha=a.shape[0])
        missed[path] = (float((change - b @ a).norm()), float(change.norm()))
    if not specs:
        raise UserError(f"the adapter {name!r} has no low-rank layers, only weights trained in full: nothing to export")
    whole = records(model)[name].whole
    for path in whole:
        for key, tensor in model.get_submodule(path).state_dict(prefix=f"{path}." if path else "").items():
            tensors[f"{PREFIX}{key}"] = tensor.detach().cpu().clone()
    rows = rows_contents(model)
    tensors |= {f"{PREFIX}{path}.{VALUES}": values for path, (_, values) in rows.items()}
    ids = {path: ids for path, (ids, _) in rows.items()}
    config = peft_config(getattr(model, "name_or_path", None) or None, specs, whole, ids)
    write_adapter(Path(folder), tensors, config, metadata(specs, {}, {}, new_tokens(model)))
    errors = {path: miss / size if size else 0.0 for path, (miss, size) in missed.items()}
    size = math.sqrt(sum(size**2 for _, size in missed.values()))
    return LoRAExport(rank, errors, math.sqrt(sum(m**2 for m, _ in missed.values())) / size if size else 0.0)


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with BA the best approximation of rank r = min(rank, out, in) to a matrix [out, in]."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= 1024:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:  # randomized: the exact one takes minutes at 4096
        u, s, v = torch.svd_lowrank(matrix, q=min(2 * rank + 16, *matrix.shape), niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
