"""The repeated blocks of a part, from its input to its output: tuning the last few, and learning rates by block."""

from __future__ import annotations

from torch import nn

from mmdora.core.errors import UserError
from mmdora.models.architectures import Region, is_inside, unused_blocks


def blocks_of(model: nn.Module, region: Region) -> list[str]:
    """Full paths of the part's blocks: the children of its longest list of modules of one class, of at least two.

    Lists beside it that hold the same belong to it: a ConvNeXt has one a stage.

    Blocks of a vision encoder behind the hidden state that the projector reads are none. Empty where a part has none.
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
    around = above.rpartition(".")[0].rpartition(".")[0]  # of a stage: what holds the stages
    stages = [
        (path, module) for path, module in lists if type(module[0]) is type(longest[0]) and is_inside(path, around)
    ]
    unused = unused_blocks(model, region)
    return [block for path, module in stages for i in range(len(module)) if (block := f"{path}.{i}") not in unused]


def last_blocks(model: nn.Module, part: str, region: Region, count: int) -> list[str]:
    """The last `count` blocks of a part. Raises UserError where it has fewer."""
    blocks = blocks_of(model, region)
    if count > len(blocks):
        raise UserError(f"parts.{part}.last_blocks: {count} of them, but the part has {len(blocks)} blocks")
    return blocks[-count:]


def rate_factors(model: nn.Module, part: str, region: Region, decay: float) -> dict[str, float]:
    """By the name of each parameter of the part: what `layer_decay` makes of its learning rate.

    What comes behind the blocks keeps it; the last block has `decay` of it, each block before that `decay` of the
    next one's, and what comes before the blocks (embeddings) `decay` of the first one's. As BEiT does (arXiv
    2106.08254), in the order in which a part declares its parameters. Raises UserError for a part without blocks.
    """
    blocks = blocks_of(model, region)
    if not blocks:
        raise UserError(f"parts.{part}.layer_decay: the part has no blocks to tell apart; leave it out")
    factors: dict[str, float] = {}
    steps = len(blocks) + 1  # of decay, for what is met next
    for name, _ in region.named_parameters(model):
        inside = next((i for i, block in enumerate(blocks) if is_inside(name, block)), None)
        if inside is not None:
            steps = len(blocks) - inside
        elif steps <= len(blocks):
            steps = 0
        factors[name] = decay**steps
    return factors
