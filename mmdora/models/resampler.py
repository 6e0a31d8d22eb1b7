"""The projector `resampler`: learned queries read a picture's patches, so that every picture costs as many tokens.

One cross-attention, as in Qwen-VL (arXiv 2308.12966), then the two layers of LLaVA-1.5's projector. Queries that read
patches by attention are Flamingo's (arXiv 2204.14198).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WIDTH = 64  # channels of an attention head, where the width is a multiple of it


class Resampler(nn.Module):
    """patches [pictures, side · side, width] → tokens [pictures, num_queries, out_width].

    The patches are those of a square picture, row by row, and of the vision encoder's width.
    """

    def __init__(self, num_queries: int, width: int, out_width: int):
        super().__init__()
        self.heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.norm_queries = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        # Without biases: the norms before have them, and one of the keys would move no attention and get no gradient.
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.norm_read = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def forward(self, patches: Tensor) -> Tensor:
        pictures, count, width = patches.shape
        # A row for every picture, though all are equal: an adapter may differ from picture to picture.
        queries = self.queries.expand(pictures, -1, -1)
        patches = self.norm_patches(patches)
        # Attention sees its keys as a set: where a patch lies must be in the key.
        places = grid_positions(math.isqrt(count), width, patches.device).to(patches.dtype)
        read = F.scaled_dot_product_attention(
            self._heads(self.q_proj(self.norm_queries(queries))),
            self._heads(self.k_proj(patches + places)),
            self._heads(self.v_proj(patches)),
        )
        tokens = queries + self.out_proj(read.transpose(1, 2).flatten(2))
        return self.linear_2(F.gelu(self.linear_1(self.norm_read(tokens))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def init_weights(self, std: float) -> None:
        """Random matrices and queries with this standard deviation; norms that change nothing."""
        nn.init.normal_(self.queries, std=std)
        for module in self.children():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            else:
                assert isinstance(module, nn.Linear)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def grid_positions(side: int, width: int, device: torch.device | None = None) -> Tensor:
    """[side · side, width], fp32: sines and cosines of a patch's row, then those of its column, row by row.

    Computed, not learned, so a grid may have any size (the frequencies of arXiv 1706.03762).
    """
    bands = width // 4
    frequencies = 10000.0 ** (-torch.arange(bands, device=device) / max(bands, 1))
    angles = torch.arange(side, device=device)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    table = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1)
    return F.pad(table, (0, width - table.shape[1]))  # a width that is no multiple of 4
