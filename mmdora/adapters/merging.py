"""Merge adapters into the weights, undo a merge, combine several adapters into one, and export a plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdora.adapters import AdapterLayer, LowRankSpec, adapter_layers
from mmdora.adapters.injection import check_has_adapters, check_new_name, check_not_merged, set_adapter
from mmdora.adapters.layers.experts import AdaptedExperts
from mmdora.adapters.layers.linear import LinearLayer
from mmdora.adapters.layers.shared_input import share_inputs
from mmdora.adapters.layers.wrapping import dequantize, name_original_dtype
from mmdora.adapters.ops.functional import dora_gain
from mmdora.adapters.peft_format import PREFIX, VALUES, metadata, peft_config
from mmdora.adapters.save_load import is_in_peft, write_adapter
from mmdora.adapters.token_rows import token_row_contents
from mmdora.core.errors import UserError
from mmdora.core.sharding import check_not_split
from mmdora.models.attention import ExplicitAttention, restore_multihead
from mmdora.models.model_state import AdapterRecord, MergeUndo, Snapshot, frozen_adapter_of, state_of
from mmdora.models.new_tokens import fold_token_rows, new_tokens, token_rows
from mmdora.models.tied_weights import FLAG, clear_tied_flags, holder_of, tied_weights, untie_all

# `combine_adapters` refuses a sum that scales a row of W by less than this: the row has no direction left.
MIN_ROW_SCALE = 1e-3
# Largest matrix side for which `best_low_rank` computes the exact SVD, which takes minutes at 4096.
MAX_EXACT_SVD = 1024
IN_ONE_PROCESS = "call save_adapter, and do this in one process with load_adapter on the base model"


def merge_adapters(model: nn.Module, name: str | None = None, reversible: bool = False) -> nn.Module:
    """Merge the active adapter (or `name`) into the weights, in place, and return the model without adapters.

    Args:
        reversible: Keep the adapters and the original weights on the model, so that `unmerge_adapters` can restore
            them exactly. Needs as much memory again as the adapted layers.

    The model can then be saved with the names and kinds of weights that its class expects: `nn.MultiheadAttention` is
    restored, and layers that bitsandbytes quantized are dequantized, unless the merge is reversible. If only one of two
    tied weights was adapted, the two are no longer tied, and the model's config says so.

    Raises:
        UserError: If the model is merged reversibly already, has no adapter `name`, or is sharded by `fully_shard`.
    """
    check_not_split(model, "merge_adapters", IN_ONE_PROCESS)
    check_not_merged(model)
    state = state_of(model)
    if reversible and state.merge_undo is not None:
        raise UserError("the model is merged already; call unmerge_adapters(model) first")
    if name is not None:
        set_adapter(model, name)
    ties, snapshots = tied_weights(model), _snapshots(model) if reversible else []
    name_original_dtype(model)
    for _, layer in list(adapter_layers(model)):
        if layer.active is not None:
            layer.merge(layer.active)
        else:
            layer.unwrap()
    for module in list(model.modules()):
        if isinstance(module, ExplicitAttention) and module.converted:
            restore_multihead(module)
    fold_token_rows(model)
    tied_configs = clear_tied_flags(model) if tied_weights(model) != ties else []
    if tied_configs or state.untied:
        untie_all(model)  # with this config, the model's class ties no other weights either
    if reversible:
        state.merge_undo = MergeUndo(snapshots, state.adapters, tied_configs)
    else:
        dequantize(model)
    state.adapters = {}
    return model


def unmerge_adapters(model: nn.Module) -> nn.Module:
    """Undo `merge_adapters(model, reversible=True)` exactly. Raises UserError if the model is not merged so."""
    check_not_split(model, "unmerge_adapters", "call unmerge_adapters before fully_shard")
    state = state_of(model)
    undo, state.merge_undo = state.merge_undo, None
    if undo is None:
        raise UserError("nothing to unmerge: merge with merge_adapters(model, reversible=True)")
    for snapshot in reversed(undo.snapshots):
        module, training = snapshot.module, snapshot.module.training
        module.__class__, module.__dict__ = snapshot.module_class, snapshot.attributes
        module.train(training)
    state.adapters = state.adapters | undo.adapters
    share_inputs(model)
    for config in undo.tied_configs:
        setattr(config, FLAG, True)
    return model


def _snapshots(model: nn.Module) -> list[Snapshot]:
    """Return snapshots of all modules that a merge may change."""
    changed: list[nn.Module] = []
    for _, layer in adapter_layers(model):
        changed += [layer, layer.block] if isinstance(layer, AdaptedExperts) else [layer]
        if isinstance(layer, LinearLayer) and layer.shared_input is not None:
            layer.shared_input.dissolve()  # `unmerge_adapters` makes new groups
    changed += [module for module in model.modules() if isinstance(module, ExplicitAttention)]
    changed += [model.get_submodule(holder_of(name)) for name in tied_weights(model)]
    changed += [model.get_submodule(path) for path, _ in token_rows(model)]
    return [_snapshot(module) for module in {id(module): module for module in changed}.values()]


def _snapshot(module: nn.Module) -> Snapshot:
    copied = ("_parameters", "_modules", "_buffers", "_forward_hooks")
    attributes = {key: value.copy() if key in copied else value for key, value in module.__dict__.items()}
    return Snapshot(module, type(module), attributes)


@torch.no_grad()
def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Add an adapter `name` that is the weighted sum of others: W' = W + Σ wᵢ(Wᵢ' − W), exact up to rounding.

    The rank of a layer is the sum of the other adapters' ranks. With gᵢ = mᵢ / ‖W + sᵢBᵢAᵢ‖ and d = 1 + Σ wᵢ(gᵢ − 1),
    the sum is d ⊙ (W + Σ (wᵢsᵢgᵢ / d) ⊙ BᵢAᵢ), which has DoRA's form again.

    Raises:
        UserError: If `weights` is empty or names an unknown adapter, or if a row of the sum nearly vanishes.
    """
    if not weights:
        raise UserError("combine_adapters: `weights` names no adapter")
    check_not_split(model, "combine_adapters", IN_ONE_PROCESS)
    check_has_adapters(model, list(weights))
    check_new_name(model, name)
    combined = {
        path: total for path, layer in adapter_layers(model) if (total := _sum(path, layer, weights)) is not None
    }
    for path, layer in list(adapter_layers(model)):
        if path not in combined:
            continue
        spec, a, b, scale = combined[path]
        layer.add_adapter(name, spec)
        tensors, shapes = layer.adapter_tensors(name), layer.shapes(layer, spec.rank)
        if spec.rank:
            suffixes = [f"{attribute}{layer.file_suffix}" for attribute in layer.low_rank]
            tensors[suffixes[0]].copy_(a.view(shapes.a))
            tensors[suffixes[1]].copy_(b.view(shapes.b))
        if spec.use_dora:
            tensors["lora_magnitude_vector"].copy_((scale * layer.fresh_norm(name)).view(shapes.magnitude))
    state_of(model).adapters[name] = AdapterRecord({})
    set_adapter(model, name)


def _sum(
    path: str, layer: AdapterLayer, weights: Mapping[str, float]
) -> tuple[LowRankSpec, Tensor, Tensor, Tensor] | None:
    """Return the combined adapter of one layer: settings, A [r, in], B [out, r] and the scale d [out] of the rows."""
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
    if scale.abs().min() < MIN_ROW_SCALE:
        raise UserError(f"{path}: with the weights {dict(weights)}, a row of W nearly vanishes from the sum")
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
    """The relative error ‖ΔW − BA‖ / ‖ΔW‖ (Frobenius norm) of an exported plain LoRA."""

    rank: int
    errors: dict[str, float]  # by layer path
    error: float  # over all layers


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | Path, rank: int, name: str = "default") -> LoRAExport:
    """Write the adapter as a plain LoRA in PEFT's layout, for inference servers without DoRA.

    B and A are the truncated SVD of each layer's change ΔW = W' − W. DoRA's ΔW has full rank in general, so the result
    is an approximation; the returned report has its error.

    Raises:
        UserError: If there is no adapter `name`, `rank` is below 1, or PEFT has no plain LoRA for a layer.
    """
    check_not_split(model, "export_lora", IN_ONE_PROCESS)
    check_has_adapters(model, [name])
    if frozen := frozen_adapter_of(model):
        raise UserError(f"export_lora: the adapter was trained on top of {frozen}, which a plain LoRA cannot name")
    if rank < 1:
        raise UserError(f"export_lora: the rank must be at least 1, not {rank}")
    tensors: dict[str, Tensor] = {}
    specs: dict[str, LowRankSpec] = {}
    norms: dict[str, tuple[float, float]] = {}  # ‖ΔW − BA‖ and ‖ΔW‖
    for path, layer in adapter_layers(model, name):
        if not is_in_peft(model, path, layer):
            raise UserError(f"{path}: PEFT has no plain LoRA for this {type(layer).__name__}")
        change = layer.merged(name) - layer.matrix().float()
        a, b = best_low_rank(change, rank)
        shapes = layer.shapes(layer, a.shape[0])
        for attribute, tensor, shape in zip(layer.low_rank, (a, b), shapes[:2], strict=True):
            tensors[f"{PREFIX}{path}.{attribute}{layer.file_suffix}"] = tensor.reshape(shape).cpu().contiguous()
        specs[path] = LowRankSpec(a.shape[0], alpha=a.shape[0])
        norms[path] = (float((change - b @ a).norm()), float(change.norm()))
    if not specs:
        raise UserError(
            f"the adapter {name!r} has no low-rank layers, only weights trained in full; there is nothing to export"
        )
    modules_in_full = state_of(model).adapters[name].modules_in_full
    for path in modules_in_full:
        for key, tensor in model.get_submodule(path).state_dict(prefix=f"{path}." if path else "").items():
            tensors[f"{PREFIX}{key}"] = tensor.detach().cpu().clone()
    rows = token_row_contents(model)
    tensors |= {f"{PREFIX}{path}.{VALUES}": values for path, (_, values) in rows.items()}
    ids = {path: ids for path, (ids, _) in rows.items()}
    config = peft_config(getattr(model, "name_or_path", None) or None, specs, modules_in_full, ids)
    write_adapter(Path(folder), tensors, config, metadata(specs, {}, {}, new_tokens(model)))
    errors = {path: error / size if size else 0.0 for path, (error, size) in norms.items()}
    size = math.sqrt(sum(size**2 for _, size in norms.values()))
    return LoRAExport(rank, errors, math.sqrt(sum(e**2 for e, _ in norms.values())) / size if size else 0.0)


def best_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] whose BA is the best approximation of a matrix [out, in], r = min(rank, out, in).

    Uses the exact SVD up to `MAX_EXACT_SVD`, and a randomized one above.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= MAX_EXACT_SVD:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, q=min(2 * rank + 16, *matrix.shape), niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
