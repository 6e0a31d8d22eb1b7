"""The repeated blocks of a part, in forward order: `last_blocks` and layer-wise learning-rate decay."""

from __future__ import annotations

from torch import nn

from mmdora.core.errors import UserError
from mmdora.models.architectures import Region, is_inside, unused_blocks


def blocks_of(model: nn.Module, region: Region) -> list[str]:
    """Return the full paths of a part's blocks, in forward order; an empty list if it has none.

    Blocks are the children of the part's longest `ModuleList` or `Sequential` of at least two modules of one class.
    Sibling lists with the same class count too (a ConvNeXt has one list per stage). Blocks of a vision encoder behind
    the hidden state that the projector reads are skipped.
    """
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if region.holds(path)
        and isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
    ]
    if not lists:
        return []
    above, longest = max(lists, key=lambda entry: len(entry[1]))
    around = above.rpartition(".")[0].rpartition(".")[0]  # the module that holds the stages
    stages = [
        (path, module) for path, module in lists if type(module[0]) is type(longest[0]) and is_inside(path, around)
    ]
    unused = unused_blocks(model, region)
    return [block for path, module in stages for i in range(len(module)) if (block := f"{path}.{i}") not in unused]


def last_blocks(model: nn.Module, part: str, region: Region, count: int) -> list[str]:
    """Return the paths of the last `count` blocks of a part. Raises UserError if it has fewer."""
    blocks = blocks_of(model, region)
    if count > len(blocks):
        raise UserError(f"parts.{part}.last_blocks: {count} is too many; the part has {len(blocks)} blocks")
    return blocks[-count:]


def rate_factors(model: nn.Module, part: str, region: Region, decay: float) -> dict[str, float]:
    """Return the factor on the learning rate for each parameter of a part, by name: layer-wise decay as in BEiT.

    Parameters behind the blocks have factor 1. The last block has `decay`, each earlier block `decay` times the factor
    of the next one, and parameters before the blocks (embeddings) `decay` times that of the first block. Before and
    behind follow the order in which the part declares its parameters (arXiv 2106.08254). Raises UserError for a part
    without blocks.
    """
    blocks = blocks_of(model, region)
    if not blocks:
        raise UserError(f"parts.{part}.layer_decay: the part has no blocks; remove the key")
    factors: dict[str, float] = {}
    steps = len(blocks) + 1  # powers of decay for the next parameter
    for name, _ in region.named_parameters(model):
        inside = next((i for i, block in enumerate(blocks) if is_inside(name, block)), None)
        if inside is not None:
            steps = len(blocks) - inside
        elif steps <= len(blocks):
            steps = 0
        factors[name] = decay**steps
    return factors
